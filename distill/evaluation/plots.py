"""The plots of the page, each one an SVG of its own that says the same bytes for the same numbers.

Twin: tests/distill/evaluation/test_plots.py.
"""

import io
import re
import textwrap
from collections.abc import Callable, Sequence

COLOURS = {"teacher": "#8a5a00", "student": "#1f5fbf"}
LAYERS = {"linear_attention": "#1f5fbf", "full_attention": "#c98a1b", "sliding_attention": "#e3c07a"}
NAMES = {
    "linear_attention": "delta rule",
    "full_attention": "softmax attention",
    "sliding_attention": "attention in a window",
}
SIZE = (5.2, 3.1)  # inches
STYLE = {
    "svg.hashsalt": "deltanet",  # or else the ids inside are random
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plots(report: dict) -> dict[str, str]:
    """SVG text by name, for every figure that the sections of this report may ask for."""
    found: dict[str, str] = {}
    if "by_position" in report:
        rows = report["by_position"]
        lines = {who: [row["perplexity"][who] for row in rows] for who in rows[0]["perplexity"]}
        found["perplexity by position"] = _lines(
            [row["last"] for row in rows], lines, "tokens before", "perplexity", log_x=True
        )
    if rows := report.get("recall", {}).get("by_distance"):
        lines = {who: [row[who] for row in rows] for who in COLOURS if who in rows[0]}
        distances = [row["distance"] for row in rows]
        found["recall by distance"] = _lines(
            distances, lines, "distance, tokens", "share recalled", log_x=True, from_zero=True
        )
    for name, task in report.get("tasks", {}).items():
        if len(task["by_level"]) > 1:
            found[f"task {name}"] = _levels(name, task)
    for name, section, figure, scale, label in (
        ("prefill", "speed", "prefill_tokens_per_second", 1, "prefill, tokens/s"),
        ("decoding", "speed", "decode_tokens_per_second", 1, "decoding, tokens/s"),
        ("cache", "memory", "cache_bytes", 2**20, "cache, MiB"),
        ("peak memory", "memory", "peak_bytes", 2**20, "peak memory, MiB"),
    ):
        if section in report:
            found[name] = _by_context(report[section]["by_context"], figure, scale, label)
    for stage in dict.fromkeys(record["stage"] for record in report.get("losses", ())):
        points = [record for record in report["losses"] if record["stage"] == stage]
        lines = {"student": [record["loss"] for record in points]}
        found[f"loss {stage}"] = _lines([p["step"] for p in points], lines, "step", f"loss, {stage}", marker="")
    return found


def layer_picture(layers: Sequence[str]) -> str:
    """One box a layer, first to last, as SVG: blue for the delta rule, brown for attention."""
    boxes = []
    for index, kind in enumerate(layers):
        x = 14 * index
        boxes.append(
            f'<rect x="{x}" y="0" width="12" height="34" rx="2" fill="{LAYERS[kind]}">'
            f"<title>layer {index}: {NAMES[kind]}</title></rect>"
        )
    width = 14 * len(layers) - 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 34" width="{width}" role="img" '
        f'aria-label="{len(layers)} layers">{"".join(boxes)}</svg>'
    )


def _by_context(rows: Sequence[dict], figure: str, scale: float, label: str) -> str:
    contexts = [row["context"] for row in rows]
    lines = {
        who: [row[who][figure] / scale if isinstance(row[who], dict) else float("nan") for row in rows]
        for who in COLOURS
        if who in rows[0]
    }
    return _lines(contexts, lines, "context, tokens", label, log_x=True, from_zero=True)


def _lines(
    x: Sequence[float],
    lines: dict[str, Sequence[float]],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    from_zero: bool = False,
    marker: str = "o",
) -> str:
    def draw(axis) -> None:
        for who in sorted(lines, reverse=True):
            axis.plot(x, lines[who], color=COLOURS[who], marker=marker, markersize=4, label=who)
        if log_x:
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{value:,}" for value in x])
            axis.minorticks_off()
        if from_zero:
            axis.set_ylim(bottom=0)
        axis.set(xlabel=x_label, ylabel=y_label)
        if len(lines) > 1:
            axis.legend(frameon=False)

    return _svg(draw, y_label)


def _levels(name: str, task: dict) -> str:
    levels = list(task["by_level"])
    parts = {"student": task["by_level"]} | ({"teacher": task["teacher"]["by_level"]} if "teacher" in task else {})

    def draw(axis) -> None:
        width = 0.8 / len(parts)
        for place, who in enumerate(sorted(parts, reverse=True)):
            at = [index + (place - (len(parts) - 1) / 2) * width for index in range(len(levels))]
            heights = [parts[who][level]["accuracy"] for level in levels]
            errors = [parts[who][level]["stderr"] for level in levels]
            axis.bar(at, heights, width, yerr=errors, color=COLOURS[who], ecolor="#444", capsize=2, label=who)
        trivial = [max(task["by_level"][level].get("floors", task["floors"]).values(), default=0) for level in levels]
        axis.hlines(
            trivial, [x - 0.45 for x in range(len(levels))], [x + 0.45 for x in range(len(levels))],
            color="#555", linestyle="--", linewidth=1, label="best trivial strategy",
        )  # fmt: skip
        width = max(48 // len(levels), 4)
        labels = [textwrap.fill(level, width, break_long_words=False) for level in levels]
        axis.set_xticks(range(len(levels)), labels, fontsize=8)
        axis.set(ylim=(0, 1.02), ylabel="share right", title=name)
        axis.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)

    return _svg(draw, f"{name}: share right by level")


def _svg(draw: Callable, label: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Ids are made from the drawing alone; several on one page must not share them.
    prefix = re.sub(r"\W+", "-", label)
    drawing = re.sub(r'\bid="', f'id="{prefix}-', drawing)
    drawing = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", drawing)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
