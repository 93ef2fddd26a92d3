"""Small models trained from nothing on a generated task, one for each mixer, all of one shape, on the same examples.

    python -m benchmarks.tasks --task mqar --options length=64 pairs=8 --mixers delta plain --steps 1000

Mixers: attention, swa (every layer in a window of --window), delta, gated_delta, global2 (gated_delta, attention in
layers 1 and N // 2), and plain: linear attention without the delta rule, S_t = S_(t-1) + phi(k_t) v_t^T with
phi = elu + 1 and the usual normaliser, in the very layer that delta has. It exists only here, to be compared with.
Attention layers have RoPE, linear ones none. Only answers are targets. Every model sees the same fresh examples;
accuracy is that of `Task.run` on test examples like those of training, and of the levels given by --test.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer
from distill.evaluation.subject import Subject
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.example import Example
from distill.evaluation.tasks.task import Task
from distill.evaluation.tasks.words import word_tokenizer

MIXERS = ("attention", "swa", "delta", "gated_delta", "global2", "plain")
IGNORED = -100


class PlainMixer(DeltaMixer):
    """The delta mixer whose state only adds up."""

    def read(self, q, k, v, beta, g, cu_seqlens=None, state=None, return_state=False):
        q, k, v = (part.transpose(1, 2).float() for part in (q, self.expand(k), self.expand(v)))
        scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
        return (scores @ v / scores.sum(-1, keepdim=True).clamp_min(1e-6)).transpose(1, 2), None


def build(mixer: str, args: argparse.Namespace, vocab_size: int) -> DeltaNetForCausalLM:
    """A fresh model; its weights depend on --seed and its shape alone."""
    kinds = {"attention": "full_attention", "swa": "sliding_attention"}
    types = [kinds.get(mixer, "linear_attention")] * args.layers
    if mixer == "global2":
        for index in {1, args.layers // 2}:
            types[index] = "full_attention"
    config = DeltaNetConfig(
        vocab_size=vocab_size, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, max_position_embeddings=4096, layer_types=types,
        sliding_window=args.window, rope_layers=[kind != "linear_attention" for kind in types],
        mixer="gated_delta" if mixer in ("gated_delta", "global2") else "delta", conv_kernel=args.conv, eos_token_id=0,
        initializer_range=args.hidden**-0.5,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = DeltaNetForCausalLM(config)
    if mixer == "plain":
        for block in model.model.layers:
            block.self_attn.__class__ = PlainMixer
    return model


def as_batch(examples: list[Example], device) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) and targets (B, T) int64; the target of position i is token i + 1 where that is part of an answer."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        at = torch.tensor(example.positions)
        targets[row, at - 1] = ids[row, at]
    return ids.to(device), targets.to(device)


def train(model, task: Task, args: argparse.Namespace, tokenizer, measure) -> list[dict]:
    """The curve: step, loss, accuracy, seconds."""
    skip = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    names = {id(p) for p in skip}
    rest = [p for p in model.parameters() if id(p) not in names]
    groups = [{"params": rest, "weight_decay": args.weight_decay}, {"params": skip, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    examples = task.examples(args.seed, args.steps * args.batch, args.options, tokenizer, split="train")
    curve, losses, start, spent = [], [], time.perf_counter(), 0.0
    for step in range(args.steps):
        rate = min((step + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        ids, targets = as_batch([next(examples) for _ in range(args.batch)], args.device)
        kept = targets != IGNORED
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[kept]
        loss = F.cross_entropy(model.lm_head(hidden).float(), targets[kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            spent = time.perf_counter() - start
            point = {"step": step + 1, "loss": sum(losses) / len(losses), "accuracy": measure(200), "seconds": spent}
            losses.clear()
            curve.append(point)
            figures = f"loss {point['loss']:.4f}  accuracy {point['accuracy']:.3f}  {spent:.0f} s"
            print(f"  {step + 1:>6}  {figures}", flush=True)
            if point["accuracy"] >= args.stop_at:
                break
    return curve


def parse_options(pairs: list[str]) -> dict:
    """`length=64` -> {"length": 64}."""
    split = (pair.partition("=") for pair in pairs)
    return {name: float(value) if "." in value else int(value) for name, _, value in split}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mqar", choices=TASKS)
    parser.add_argument("--options", nargs="*", default=[], help="of the training examples, such as length=64 pairs=8")
    parser.add_argument("--test", nargs="*", action="append", help="options of a further test level; repeat for more")
    parser.add_argument("--mixers", nargs="+", default=["delta", "plain"], choices=MIXERS)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--window", type=int, default=16, help="of swa")
    parser.add_argument("--conv", type=int, default=0, help="kernel of the convolution in linear layers; 0 is none")
    parser.add_argument("--vocabulary", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements")
    parser.add_argument("--stop-at", type=float, default=2.0, help="accuracy at which training ends")
    parser.add_argument("--test-examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON of all curves and results")
    args = parser.parse_args()
    task = TASKS[args.task]
    args.options = task.options(parse_options(args.options))
    levels = {"as trained": args.options}
    levels |= {" ".join(pairs): task.options(args.options | parse_options(pairs)) for pairs in args.test or ()}
    test = Task(task.name, task.describe, levels, task.make)
    quick = Task(task.name, task.describe, {"as trained": args.options}, task.make)
    tokenizer, device, found = word_tokenizer(args.vocabulary), torch.device(args.device), {}
    for mixer in args.mixers:
        model = build(mixer, args, args.vocabulary).to(device)
        size = sum(p.numel() for p in model.parameters())
        subject = Subject(mixer, model, tokenizer, device, torch.float32, 4096)
        print(f"{mixer}: {size:,} parameters, {args.task} {args.options}, seed {args.seed}", flush=True)
        measure = lambda n: quick.run(subject, seed=args.seed + 1, n=n, max_context=4096).accuracy  # noqa: B023
        curve = train(model, task, args, tokenizer, measure)
        result = test.run(subject, seed=args.seed, n=args.test_examples * len(levels), max_context=4096)
        found[mixer] = {"parameters": size, "curve": curve, "result": result.as_json()}
        for label, level in result.by_level.items():
            floor = max(level["floors"].items(), key=lambda item: item[1])
            print(f"  {label}: {level['accuracy']:.3f} ± {level['stderr']:.3f}, floor {floor[1]:.3f} ({floor[0]})")
    if args.output:
        facts = {"command": sys.argv, "torch": torch.__version__, "device": str(device), "mixers": found}
        args.output.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
