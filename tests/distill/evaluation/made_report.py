"""A report with every part in it, made up, so that what is shown can be compared with what was put in."""

import copy

NO_FIT = "does not fit in memory"
SPEED = {
    "prefill_tokens_per_second": 1000.0,
    "first_token_seconds": 0.05,
    "decode_tokens_per_second": 40.0,
    "rounds": 3,
}
TASK = {
    "name": "needle",
    "accuracy": 0.75,
    "stderr": 0.05,
    "n": 80,
    "floors": {"chance": 0.1, "the first": 0.2},
    "by_level": {"64": {"accuracy": 1.0, "stderr": 0.0, "n": 40}, "128": {"accuracy": 0.5, "stderr": 0.08, "n": 40}},
    "samples": [{"prompt": "a <u> b", "answer": "c", "said": "d"}],
    "figures": {"says A": 0.25},
    "partial_floors": {"reading 1 deep": 0.6, "reading 2 deep": 0.7},
}
FIRST = {"teacher": 0.3, "student": 0.2}
REPORT = {
    "student": "runs/<b>mine</b>",
    "teacher": "big|one",
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
    "versions": {"deltanet": "0.1.0"},
    "layers": ["linear_attention", "full_attention", "sliding_attention"],
    "seconds": {"language": 12.0},
    "text": "valid.txt",
    "tokens": 2048,
    "window": 64,
    "perplexity": {"teacher": 10.0, "student": 12.5},
    "kl": 0.125,
    "top1_agreement": 0.875,
    "by_position": [
        {"first": 1, "last": 16, "perplexity": {"teacher": 20.0, "student": 22.0}, "kl": 0.1, "top1_agreement": 0.9},
        {"first": 17, "last": 63, "perplexity": {"teacher": 9.0, "student": 18.0}, "kl": 0.2, "top1_agreement": 0.8},
    ],
    "by_seen": [
        {"seen": "new", "tokens": 30, "perplexity": {"teacher": 40.0, "student": 44.0}, "kl": 0.1,
         "top1_agreement": 0.7},
        {"seen": "pair", "tokens": 10, "perplexity": {"teacher": 2.0, "student": 4.0}, "kl": 0.3,
         "top1_agreement": 0.6},
    ],
    "samples": [
        {"prompt": "Once <i>", "text": "upon", "student": "a `dog`\nran", "teacher": "a dog", "same_tokens": 2},
    ],
    "recall": {"distance": 24, "repeat": {"teacher": 0.5, "student": 0.25}, "needle": {"teacher": 0.0, "student": 0.0},
               "by_distance": [{"distance": 64, "teacher": 0.9, "student": 0.5, "first": FIRST},
                               {"distance": 128, "teacher": 0.8, "student": 0.25, "first": FIRST}]},
    "tasks": {"needle": TASK | {"teacher": TASK | {
        "accuracy": 0.9, "stderr": 0.03, "figures": {}, "samples": [{"said": "c"}],
    }}},
    "skipped_tasks": {"copying": "task copying: too long"},
    "speed": {
        "device": "cpu",
        "threads": 2,
        "cores": 4,
        "load": 0.25,
        "decoded_tokens": 32,
        "backend": {"student": "prefill: chunk", "teacher": "attention: sdpa"},
        "by_context": [
            {"context": 128, "teacher": SPEED, "student": SPEED},
            {"context": 4096, "teacher": NO_FIT, "student": SPEED | {"decode_tokens_per_second": 39.0}},
        ],
        "crossover": {"decode_tokens_per_second": "behind at the longest context measured, 128 tokens"},
    },
    "memory": {
        "weights_bytes": {"teacher": 2**20, "student": 2**21},
        "by_context": [
            {"context": 128, "teacher": {"cache_bytes": 4096, "peak_bytes": 2**22}, 
             "student": {"cache_bytes": 2048, "peak_bytes": 2**22}},
            {"context": 4096, "teacher": NO_FIT, "student": {"cache_bytes": 9999, "peak_bytes": 2**23}},
        ],
        "cache_bytes_per_token": {"teacher": None, "student": 2.0},
        "crossover": "needs two contexts",
    },
    "diagnostics": {
        "What the layers do": {"layer 0": {"gate": 0.5, "half-life": 16.0}, "layer 2": {"gate": 0.25}},
        "What is off": {"all states": {"loss rise": 0.25, "recall 128": 0.75, "first 128": 0.3}},
    },
    "losses": [{"stage": "align", "step": step, "loss": 2.0 / (step + 1)} for step in range(5)],
}  # fmt: skip


def made(**changes) -> dict:
    return copy.deepcopy(REPORT) | changes


def alone() -> dict:
    """The same without a teacher, and with nothing measured but language."""
    report = made(teacher=None, perplexity={"student": 12.5})
    for row in [*report["by_position"], *report["by_seen"]]:
        row["perplexity"].pop("teacher")
        del row["kl"], row["top1_agreement"]
    for key in ("kl", "top1_agreement", "tasks", "skipped_tasks", "speed", "memory", "diagnostics", "losses", "recall"):
        del report[key]
    report["samples"] = [{"prompt": "Once", "text": "upon", "student": "a"}]
    return report
