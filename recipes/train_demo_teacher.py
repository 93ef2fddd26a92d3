"""Train the embedded demo teacher `recipes/demo`: a small Llama that writes TinyStories-like text.

    python recipes/train_demo_teacher.py --text train_v1.txt train_v2.jsonl --report valid_v2.jsonl \
        --writer stories260K --output recipes/demo

There is little real text, so a pretrained writer (a Llama that wrote stories before) samples more of it; every batch
mixes the two, with a share of real text that rises linearly from 0 to a value of `--real-shares`. Each value trains
one candidate from the same seed; the lowest loss on real documents held out from `--text` keeps its folder.
`--report` files are measured once a candidate is kept, and choose nothing.

One H100, torch 2.11, transformers 5.17: 71 s for 39.3 MB of written stories (55,005), then 61 s a candidate of 1500
steps = 98.3 M tokens. Held out, nats/token: 2.0425 (share 0.2, kept), 2.3186 (share 0.5: it learns the real text by
heart). Seeded, but CUDA's attention gradient adds in no fixed order: a repeat differs in the last digits.
"""

import argparse
import json
import os
import random
import re
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END = "<|endoftext|>"
CONTEXT = 512
# Windows-1252 bytes that were once decoded twice, and typographic signs: the stories need plain ASCII alone.
ASCII = [("â€œ", '"'), ("â€™", "'"), ("â€˜", "'"), ("â€“", "-"), ("â€”", "-"), ("â€¦", "...")]
ASCII += [("â€\x9d", '"'), ("â€", '"')]
ASCII += [("“", '"'), ("”", '"'), ("’", "'"), ("‘", "'"), ("—", "-"), ("–", "-"), ("…", "...")]


def tidy(story: str) -> str:
    """ASCII quotes, one newline between paragraphs, no blanks at either end of a line."""
    for sign, plain in ASCII:
        story = story.replace(sign, plain)
    return "\n".join(line.strip() for line in story.split("\n") if line.strip())


def read_stories(path: Path) -> list[str]:
    """Stories of a `.jsonl` file (key `text`), or of a text file where a lone newline ends a story."""
    raw = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        stories = [json.loads(line)["text"] for line in raw.splitlines() if line.strip()]
    else:
        stories = [part for block in raw.split(END) for part in re.split(r"(?<!\n)\n(?!\n)", block)]
    stories = [tidy(story) for story in stories]
    return [story for story in stories if len(story) > 100 and story.isascii()]


@torch.no_grad()
def write_stories(writer: Path, args: argparse.Namespace) -> list[str]:
    """Sample stories from the writer; only those that came to their own end within the writer's context are kept."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    model = AutoModelForCausalLM.from_pretrained(writer, dtype=torch.float32).to(args.device).eval()
    start, ends, stories = model.config.bos_token_id, {model.config.bos_token_id, model.config.eos_token_id}, []
    for _ in range(args.sample_batches):
        first = torch.full((args.sample_size, 1), start, device=args.device)
        rows = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=args.temperature,
            top_k=0, top_p=1.0,
            max_new_tokens=args.sample_tokens, eos_token_id=sorted(ends), pad_token_id=start,
        )  # fmt: skip
        kept = []
        for row in rows[:, 1:].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), None)
            if length:
                kept.append(row[:length])
        stories += [tidy(text) for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]
    return [story for story in stories if len(story) > 100 and story.isascii()]


def train_tokenizer(stories: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose token 0 starts and ends every story."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[str], device: str) -> torch.Tensor:
    """One stream: END story END story ... END."""
    batches = tokenizer.backend_tokenizer.encode_batch(stories)
    ids = [token for item in batches for token in (0, *item.ids)] + [0]
    return torch.tensor(ids, dtype=torch.int32, device=device)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=192, intermediate_size=336, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(args.device)


def autocast(device: str):
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


@torch.no_grad()
def measure(model, stream: torch.Tensor) -> float:
    """Nats per token over the stream in windows of CONTEXT tokens that overlap by one."""
    model.eval()
    total, count = 0.0, 0
    windows = [stream[i : i + CONTEXT + 1].long() for i in range(0, len(stream) - 1, CONTEXT)]
    for window in windows:
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    model.train()
    return total / count


def draw(stream: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(stream) - CONTEXT - 1, (rows, 1), generator=generator, device=stream.device)
    return stream[starts + torch.arange(CONTEXT + 1, device=stream.device)].long()


def train(args, real: torch.Tensor, written: torch.Tensor, held_out: torch.Tensor, share: float) -> LlamaForCausalLM:
    model = build_model(args)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1]}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    start = time.time()
    for step in range(args.steps):
        progress = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup) * (1.0 - progress)
        num_real = round(args.batch_size * share * progress)
        window = torch.cat([draw(real, num_real, generator), draw(written, args.batch_size - num_real, generator)])
        with autocast(args.device):
            logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0 or step == args.steps - 1:
            seen = time.time() - start
            print(
                f"  step {step} loss {loss.item():.4f} held-out {measure(model, held_out):.4f} {seen:.0f} s", flush=True
            )
    return model


@torch.no_grad()
def tell_page(model, tokenizer, args: argparse.Namespace) -> str:
    """Stories by the trained teacher that end by themselves, blank lines between them, about `--page-chars` long."""
    torch.manual_seed(args.seed)
    page = ""
    while len(page) < args.page_chars:
        first = torch.zeros((64, 1), dtype=torch.long, device=args.device)
        rows = model.generate(
            first, attention_mask=torch.ones_like(first), do_sample=True, temperature=0.7, top_k=0, top_p=0.95,
            max_new_tokens=CONTEXT - 1,
        )  # fmt: skip
        for row in rows[:, 1:].tolist():
            if 0 in row and row.index(0) >= 80 and len(page) < args.page_chars:
                page += tokenizer.decode(row[: row.index(0)]).strip() + "\n\n"
    return page.rstrip() + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="real stories: .txt or .jsonl files")
    parser.add_argument("--report", type=Path, nargs="*", default=[], help="files measured once, at the end")
    parser.add_argument("--writer", type=Path, required=True, help="folder of a Llama that writes stories")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real-shares", type=float, nargs="+", default=[0.2, 0.5], help="one candidate each")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128, help=f"windows of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sample-batches", type=int, default=4)
    parser.add_argument("--sample-size", type=int, default=16384, help="stories in a batch")
    parser.add_argument("--sample-tokens", type=int, default=460)
    parser.add_argument("--temperature", type=float, default=0.85, help="of the writer")
    parser.add_argument("--page-chars", type=int, default=12000)
    parser.add_argument("--log-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(args.seed)
    began = time.time()
    stories = [story for path in args.text for story in read_stories(path)]
    random.Random(args.seed).shuffle(stories)
    num_held = len(stories) // 20
    held_stories, real_stories = stories[:num_held], stories[num_held:]
    written_stories = write_stories(args.writer, args)
    print(f"{len(real_stories)} real, {num_held} held-out, {len(written_stories)} written stories", end=" ")
    print(f"({sum(map(len, written_stories)) / 1e6:.1f} MB) {time.time() - began:.0f} s", flush=True)
    print("written:", written_stories[:2])
    tokenizer = train_tokenizer(real_stories + written_stories[: 2 * len(real_stories)], args.vocab_size)
    real, written, held_out = (encode(tokenizer, s, args.device) for s in (real_stories, written_stories, held_stories))
    bytes_per_token = (sum(map(len, held_stories)) + num_held) / len(held_out)
    print(f"tokens: real {len(real)}, written {len(written)}, held-out {len(held_out)}", end=" ")
    print(f"({bytes_per_token:.3f} bytes/token) {time.time() - began:.0f} s", flush=True)
    best = float("inf")
    for share in args.real_shares:
        print(f"real share 0 to {share}")
        model = train(args, real, written, held_out, share).to(torch.bfloat16).eval()
        loss = measure(model.float(), held_out)  # the rounded weights, computed in float32
        print(f"real share 0 to {share}: held-out {loss:.4f} nats/token, {loss / bytes_per_token:.4f} nats/byte")
        if loss < best:
            best = loss
            model.eval()
            page = tell_page(model, tokenizer, args)
            for path in args.report:
                stream = encode(tokenizer, read_stories(path), args.device)
                print(f"{path.name}: {measure(model, stream):.4f} nats/token")
            model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
            model.eval().to(torch.bfloat16).save_pretrained(args.output)
            tokenizer.save_pretrained(args.output)
            (args.output / "text.txt").write_text(page, encoding="utf-8")
            print(page[:2500], f"\n{time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
