"""What a run leaves for people: a table of teacher, converted and distilled, the text it writes, and a loss curve.

The same facts stand in report.json. Twin: tests/distill/test_report.py.
"""

import json
from pathlib import Path

import torch


def table(rows: list[dict]) -> str:
    """Rows of `model`, `perplexity`, optionally `kl`, as aligned text; the ratio is to the first row, which is the
    teacher where there is one."""
    base, first = rows[0]["perplexity"], rows[0]["model"]
    cells = [("", "perplexity", f"x {first}", "KL, nats/token")]
    for row in rows:
        kl = f"{row['kl']:.4f}" if "kl" in row else "-"
        cells.append((row["model"], f"{row['perplexity']:.3f}", f"{row['perplexity'] / base:.3f}", kl))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = []
    for line in cells:
        parts = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def write_report(folder: Path, facts: dict, metrics: list[dict]) -> str:
    """Writes report.json, report.md and, where there are metrics, loss.png. Returns the text for the terminal."""
    (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lines = [table(facts["results"]), ""]
    lines.append(f"held-out tokens {facts['held_out_tokens']:,}   training tokens {facts['tokens']:,}")
    for model, text in facts["samples"].items():
        lines.append(f"\n{model} writes: {text}")
    text = "\n".join(lines)
    (folder / "report.md").write_text(f"```\n{text}\n```\n", encoding="utf-8")
    if metrics:
        _plot(folder / "loss.png", metrics)
    return text


def _plot(path: Path, metrics: list[dict]) -> None:
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(record["stage"] for record in metrics))
    figure = Figure(figsize=(4 * len(stages), 3), layout="constrained")
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, stage in zip(axes, stages):
        points = [(r["step"], r["loss"]) for r in metrics if r["stage"] == stage and r["loss"] is not None]
        axis.plot(*zip(*points)) if points else None
        axis.set(title=stage, xlabel="step", ylabel="loss")
    figure.savefig(path, dpi=120)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def sample(model, tokenizer, prompt: str, max_new_tokens: int = 60) -> str:
    """The prompt and how the model goes on from it, greedily."""
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids.pop("token_type_ids", None)
    # A tokenizer that ends every text with eos would make the prompt a finished document.
    while ids["input_ids"].shape[1] > 1 and int(ids["input_ids"][0, -1]) == tokenizer.eos_token_id:
        ids = {key: value[:, :-1] for key, value in ids.items()}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(out[0], skip_special_tokens=True)
