"""Small models trained from nothing on a generated task, one a mixer and seed, of one shape, on the same examples.

    python -m benchmarks.tasks --task mqar --options length=64 pairs=8 --mixers delta plain --seeds 0 1 --steps 600

Mixers: attention, swa (every layer in a window of --window), delta, gated_delta, global2 (gated_delta, attention in
layers 1 and N // 2), and plain: linear attention without the delta rule, S_t = S_(t-1) + phi(k_t) v_t^T with
phi = elu + 1 and the usual normaliser, in the very layer that delta has. It exists only here, to be compared with.
Models and optimizer are those of a recipe (`student.new`, a stage `pretrain`). All read the same --examples, in an
order that follows from the seed, as often as --steps asks for. Accuracy is that of `Task.run` on test examples like
those of training, and of the levels given by --test. The table is printed and, with --output, all of it kept as JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from deltanet import DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer
from distill.evaluation.subject import Subject
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.task import Task
from distill.new_student import new_model, plan_new
from distill.packing import IGNORED
from distill.schedules import Schedule
from distill.schema import New, Stage
from distill.trainable import parameter_groups

HYBRIDS = {"attention": "all", "delta": "none", "gated_delta": "none", "global2": "global2", "plain": "none"}
MIXERS = ("attention", "swa", "delta", "gated_delta", "global2", "plain")
CONTEXT = 4096


class PlainMixer(DeltaMixer):
    """The delta mixer whose state only adds up."""

    def read(self, q, k, v, beta, g, cu_seqlens=None, state=None, return_state=False):
        q, k, v = (part.transpose(1, 2).float() for part in (q, self.expand(k), self.expand(v)))
        scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return (scores @ v / scores.sum(-1, keepdim=True).clamp_min(1e-6)).transpose(1, 2), None


def build(mixer: str, args: argparse.Namespace, seed: int) -> tuple[DeltaNetForCausalLM, object]:
    """A fresh model and its tokenizer; its weights follow from its shape and the seed alone."""
    wish = New(
        vocabulary=args.vocabulary,
        layers=args.layers,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        heads=args.heads,
        hybrid=HYBRIDS.get(mixer, "all"),
        mixer="gated_delta" if mixer in ("gated_delta", "global2") else "delta",
        conv=args.conv,
        skip_conv=args.skip_conv,
        max_context=CONTEXT,
    )
    config, tokenizer = plan_new(wish)
    if mixer == "swa":
        config.layer_types = ["sliding_attention"] * args.layers
        config.sliding_window = args.window
    model = new_model(config, seed)
    if mixer == "plain":
        for block in model.model.layers:
            block.self_attn.__class__ = PlainMixer
    return model, tokenizer


def as_batch(task: Task, args: argparse.Namespace, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (N, T) and targets (N, T) int64 of the training examples, T the longest; the target of position i is the
    answer at i + 1, where there is one."""
    examples = list(task.examples(0, args.examples, args.options, tokenizer, split="train"))
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        at = torch.tensor(example.positions)
        targets[row, at - 1] = torch.tensor([example.target(position) for position in example.positions])
    return ids, targets


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows of batch after batch without end, every epoch in a new order."""
    stream = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=stream)])
        yield left[:size]
        left = left[size:]


def train(model, data: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace, seed: int, measure) -> list[dict]:
    """The curve: step, loss, accuracy, seconds."""
    stage = Stage(kind="pretrain", name="pretrain", steps=args.steps, lr=args.lr, weight_decay=args.weight_decay)
    groups = parameter_groups(dict(model.named_parameters()), stage, model.config)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=stage.adam_betas)
    schedule = Schedule("cosine", args.steps, args.warmup)
    rows, (ids, targets) = batches(args.examples, args.batch, seed), data
    curve, losses, start = [], [], time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step)
        chosen = next(rows)
        wanted = targets[chosen].to(args.device)
        hidden = model.model(input_ids=ids[chosen].to(args.device), use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[wanted != IGNORED]).float(), wanted[wanted != IGNORED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            point = {"step": step + 1, "loss": torch.stack(losses).mean().item(), "accuracy": measure()}
            point["seconds"] = time.perf_counter() - start
            losses.clear()
            curve.append(point)
            figures = f"loss {point['loss']:.4f}  accuracy {point['accuracy']:.3f}  {point['seconds']:.0f} s"
            print(f"  {step + 1:>6}  {figures}", flush=True)
            if point["accuracy"] >= args.stop_at:
                break
    return curve


def one(mixer: str, seed: int, data, task: Task, levels: dict, args: argparse.Namespace) -> dict:
    """Trains a model and measures it."""
    model, tokenizer = build(mixer, args, seed)
    model.to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{mixer}: {size:,} parameters, {task.name} {args.options}, seed {seed}", flush=True)
    subject = Subject(mixer, model, tokenizer, torch.device(args.device), torch.float32, CONTEXT)

    def accuracy_on(level: dict, n: int) -> dict:
        only = Task(task.name, task.describe, {"": level}, task.make)
        return only.run(subject, seed=0, n=n, max_context=CONTEXT).as_json()

    curve = train(model, data, args, seed, lambda: accuracy_on(args.options, 200)["accuracy"])
    results = {label: accuracy_on(level, args.test_examples) for label, level in levels.items()}
    return {"mixer": mixer, "seed": seed, "parameters": size, "curve": curve, "results": results}


def table(runs: list[dict], levels: list[str]) -> str:
    """A row per mixer: parameters, accuracy of every seed at each level, steps, and the median of seconds."""
    lines = [
        f"| mixer | parameters | {' | '.join(levels)} | steps | seconds |",
        f"|---|---|{'---|' * len(levels)}---|---|",
    ]
    for mixer in dict.fromkeys(run["mixer"] for run in runs):
        own = [run for run in runs if run["mixer"] == mixer]
        shown = [", ".join(f"{100 * run['results'][level]['accuracy']:.1f}" for run in own) for level in levels]
        steps = ", ".join(str(run["curve"][-1]["step"]) for run in own)
        seconds = statistics.median(run["curve"][-1]["seconds"] for run in own)
        lines.append(f"| {mixer} | {own[0]['parameters']:,} | {' | '.join(shown)} | {steps} | {seconds:.0f} |")
    for level in levels:
        floor = max(runs[0]["results"][level]["floors"].items(), key=lambda item: item[1])
        lines.append(f"\nfloor, {level}: {100 * floor[1]:.1f} ({floor[0]})")
    return "\n".join(lines)


def parse_options(pairs: list[str]) -> dict:
    """`length=64` -> {"length": 64}; what is no number stays text."""
    found = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = float(value) if "." in value else int(value)
        except ValueError:
            found[name] = value
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mqar", choices=TASKS)
    parser.add_argument("--options", nargs="*", default=[], help="of the training examples, such as length=64 pairs=8")
    parser.add_argument("--test", nargs="*", action="append", help="options of a further test level; repeat for more")
    parser.add_argument("--mixers", nargs="+", default=MIXERS, choices=MIXERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the weights and the order of examples")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intermediate", type=int, help="width of the MLP; twice --hidden unless given")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--window", type=int, default=16, help="of swa")
    parser.add_argument("--conv", type=int, default=4, help="kernel of the convolution in linear layers; 0 is none")
    parser.add_argument("--skip-conv", type=int, default=0, help="tokens of v that bypass the state of linear layers")
    parser.add_argument("--vocabulary", type=int, default=256, help="tokens")
    parser.add_argument("--examples", type=int, default=50_000, help="to train on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--stop-at", type=float, default=2.0, help="accuracy at which training ends")
    parser.add_argument("--test-examples", type=int, default=1000, help="of each level")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON of all curves and results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    task = TASKS[args.task]
    args.options = task.options(parse_options(args.options))
    levels = {"as trained": args.options}
    levels |= {" ".join(pairs): task.options(args.options | parse_options(pairs)) for pairs in args.test or ()}
    data = as_batch(task, args, build(args.mixers[0], args, 0)[1])
    runs = []
    for seed in args.seeds:
        for mixer in args.mixers:
            runs.append(one(mixer, seed, data, task, levels, args))
            if args.output:
                hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
                facts = {"command": sys.argv[1:], "torch": torch.__version__, "hardware": hardware, "runs": runs}
                args.output.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(runs, list(levels)))


if __name__ == "__main__":
    main()
