"""`deltanet-convert TEACHER --rank METHOD -o ranking.json`: reads the teacher and the text, ranks, writes one file.

The file is a JSON object whose `ranking` is what `--hybrid ranking.json:COUNT` reads; the rest says how it was made.
"""

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from deltanet_errors import UserError

from ..command import load_tokenizer, mixer_options
from ..compat import DEFAULTS, option
from ..families import teacher_config
from ..layouts import parse_layout
from ..plan import student_config
from ..progress import progress
from ..sources import open_source
from ..staging import LONGEST_NAME

SUFFIX = ".json"
OF_MIXER = (*DEFAULTS, "compat")
NOT_FOR_RANKING = ("hybrid", "dtype", "max_shard_size", "dry_run")


def rank(
    source: str | Path,
    output: str | Path,
    method: str,
    *,
    mixer: str | None = None,
    state_heads: str | None = None,
    state_positions: str | None = None,
    feature_map: str | None = None,
    skip_conv: int | None = None,
    local_window: int | None = None,
    conv: int | None = None,
    gate: str | None = None,
    beta_range: int | None = None,
    compat: str | None = None,
    calibrate: Sequence[str] = ("self",),
    held_out: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
) -> dict:
    """Writes the ranking of `source`'s layers by `method` to the file `output` and returns it.

    Maps and mixers are fitted on the texts `calibrate`; scores come from what is set aside of them, or from the file
    `held_out`. The mixer's options are those of the student that is planned. Raises UserError for every kind of wrong
    input, in which case nothing is left at `output`.
    """
    import torch

    from deltanet.generate import pick_device

    from ..loading import load_teacher
    from ..text import calibration_text, check_sources, enough_tokens
    from .linearity import TOKENS_PER_UNIT
    from .rank import check_text, linear_twin, parse_method, rank_layers, rounds

    name, _ = parse_method(method)
    where = pick_device(device)
    options = mixer_options(
        mixer, state_heads, state_positions, feature_map, skip_conv, local_window, conv, gate, beta_range, compat
    )
    out = check_target(Path(output).expanduser(), overwrite)
    if "none" in calibrate:
        raise UserError(f"--calibrate none: --rank {method} needs text; give files, or self")
    start = time.monotonic()
    store = out.absolute().with_name(f".{out.name}.calibration")
    with open_source(str(source), revision, allow_pickle) as opened:
        config = teacher_config(opened.folder)
        layout = parse_layout("none", config.layer_types, config.sliding_window)
        tokenizer = load_tokenizer(opened.folder)
        check_sources(calibrate, held_out, tokenizer)
        teacher = load_teacher(opened.folder, torch.float32, allow_pickle=allow_pickle).to(where)
        is_linearity = name == "linearity"
        tokens = max(enough_tokens(config), TOKENS_PER_UNIT * config.hidden_size) if is_linearity else None
        with progress("writing the text", max(list(calibrate).count("self"), 1)) as advance:
            text = calibration_text(calibrate, held_out, tokenizer, teacher, tokens=tokens, seed=seed, advance=advance)
        check_text(method, text)
        twin, num_layers = None, config.num_hidden_layers
        if not is_linearity:
            with progress("calibrating", num_layers, "layers") as advance:
                planned = student_config(config, layout, **options)
                twin = linear_twin(teacher, planned, text.fit, folder=store, advance=advance)
        with progress(f"ranking by {method}", rounds(method, num_layers), "steps") as advance:
            found = rank_layers(teacher, method, text, twin, advance=advance)
        found |= {
            "source": opened.name,
            "mixer": None if is_linearity else options,
            "calibrate": list(calibrate),
            "held_out": held_out,
            "seed": seed,
            "seconds": round(time.monotonic() - start, 3),
        }
    write_whole(out, json.dumps(found, indent=2) + "\n")
    shutil.rmtree(store, ignore_errors=True)
    return found


def run(method: str, options: dict, as_json: bool) -> None:
    """The command line: ranks, then prints a table, or with as_json what was written. `options` are those of
    `deltanet-convert`, by name."""
    from ..command import convert, defaults_of

    defaults = defaults_of(convert)
    source, output = options["source"], options["output"]
    for key in NOT_FOR_RANKING:
        if options[key] != defaults[key]:
            raise UserError(f"{option(key)}: --rank {method} writes a ranking, no student; leave it out")
    if output is None:
        raise UserError("-o RANKING.json: missing; it names the file for the ranking, which must not exist")
    chosen = {key: value for key, value in options.items() if key not in (*NOT_FOR_RANKING, "source", "output")}
    found = rank(source, output, method, **chosen)
    given = [f" {option(name)} {options[name]}" for name in OF_MIXER if options[name] is not None]
    if tuple(options["calibrate"]) != defaults["calibrate"]:
        given.append(f" --calibrate {shlex.join(options['calibrate'])}")
    print(json.dumps(found) if as_json else describe(found, source, output, "".join(given)))


def check_target(out: Path, overwrite: bool) -> Path:
    """Raises UserError where the ranking could not be written, before minutes are spent on it."""
    if out.suffix != SUFFIX:
        raise UserError(f"-o {out}: a ranking is a {SUFFIX} file; --hybrid reads no other name")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(f"-o {out}: the name is too long; allowed: {LONGEST_NAME} bytes")
    if os.path.lexists(out):
        if not overwrite:
            raise UserError(f"-o {out}: exists already; --overwrite replaces it once the new one is complete")
        if not _is_ranking(out):
            raise UserError(f"-o {out}: --overwrite replaces a ranking only, and this is none")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"-o {out}: {parent} is not a folder that can be written")
    return out


def _is_ranking(path: Path) -> bool:
    try:
        return path.is_file() and "ranking" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def write_whole(out: Path, content: str) -> None:
    """The file appears whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"-o {out}: the ranking cannot be written: {error.strerror or error}") from None


def describe(found: dict, source: str, output: str | Path, options: str = "") -> str:
    """The ranking as text for people; `options` are those that the student should have as well."""
    columns = list(found["layers"][0])
    rows = [columns] + [
        [f"{value:.4f}" if isinstance(value, float) else str(value) for value in (row[key] for key in columns)]
        for row in found["layers"]
    ]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    tokens = found["tokens"]
    return "\n".join(
        [
            f"by {found['method']}, the layer that most needs attention first; score: {found['score']}",
            "",
            *table,
            "",
            f"fitted on {tokens['fit']:,} tokens, scored on {tokens['scored']:,}; took {found['seconds']:.1f} s",
            f"next     deltanet-convert {source} --hybrid {output}:COUNT{options} -o student",
        ]
    )
