"""`convert`: SOURCE to OUT. Opens the source, makes the plan, calibrates, and lets the executor write.

Nothing is written before every check on the input has passed, and OUT appears in one rename at the end (`staging.py`).
`run` is what the command line calls: it adds the printing.
"""

import contextlib
import copy
import errno
import inspect
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from deltanet.config import FEATURE_MAPS, MIXERS, STATE_HEADS, STATE_POSITIONS
from deltanet_errors import UserError, nearest, one_line

from .checkpoint import open_checkpoint
from .compat import DEFAULTS, FIELDS, option, resolve
from .execute import Written, execute, write_small
from .families import teacher_config
from .layouts import LINEAR, parse_layout
from .plan import WEIGHT_DTYPES, Plan, make_plan, student_config
from .progress import progress
from .publish.card import make_card
from .publish.files import README, RECORD
from .publish.licences import from_head
from .publish.manifest import MANIFEST, as_manifest
from .publish.provenance import list_of, provenance, public_name
from .sizes import parse_size
from .sources import COMPANIONS, Source, open_source
from .staging import Staging, check_target
from .tokens import GENERATION, generation_settings, strangers

GATES = {"read": (True, False), "output": (False, True), "both": (True, True), "none": (False, False)}


def convert(
    source: str | Path,
    output: str | Path | None,
    *,
    hybrid: str = "global2",
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
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    calibrate: Sequence[str] = ("self",),
    held_out: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str = "auto",
) -> dict:
    """Writes the student of `source` to the folder `output` and returns the report: source, output, layout, tensors,
    closeness, seconds, peak_rss_mb, notes; with dry_run, which needs no `output`, the plan.

    `calibrate` is texts (files), `self`, or `none` for the plain copy; it runs on `device` (auto: the first CUDA
    device, else the CPU), and an interrupted one goes on from its last finished layer. Options of the mixer that are
    None are as `compat` (compat.py) needs them, else `compat.DEFAULTS`. Raises UserError for every kind
    of wrong input, in which case nothing is left at `output`.
    """
    given, start = dict(locals()), time.monotonic()
    from deltanet.generate import pick_device

    from .formats import check_format
    from .text import check_sources

    out = None if output is None else Path(output).expanduser()
    options = mixer_options(
        mixer, state_heads, state_positions, feature_map, skip_conv, local_window, conv, gate, beta_range, compat
    )
    where = pick_device(device)
    target_dtype = WEIGHT_DTYPES.get(_one_of("--dtype", dtype, ("auto", *WEIGHT_DTYPES)))
    limit = parse_size("--max-shard-size", max_shard_size)
    if out is not None:
        check_target(out, overwrite)
    with open_source(str(source), revision, allow_pickle) as opened:
        if out is not None:
            check_target(out, True, opened.folder)
        teacher = teacher_config(opened.folder)
        layout = parse_layout(hybrid, teacher.layer_types, teacher.sliding_window)
        checkpoint = open_checkpoint(opened.folder, allow_pickle)
        wanted = student_config(teacher, layout, **options)
        if compat is not None:
            check_format(compat, wanted, "--compat")
        plan = make_plan(checkpoint, wanted, target_dtype)
        tokenizer = load_tokenizer(opened.folder)
        if tokenizer is None:
            plan.notes.append("the source has no tokenizer; the student has none either")
        plan.notes += strangers(tokenizer, plan.config, generation_settings(opened.folder))
        check_sources(calibrate, held_out, tokenizer)
        unread = [] if layout.linear else [name for name in DEFAULTS if given[name] is not None]
        if unread:
            plan.notes.append(f"no layer is linear, so {', '.join(map(option, unread))} changes nothing")
        report = {
            "source": opened.name,
            "origin": opened.origin,
            "revision": opened.revision,
            **provenance(opened, given, defaults_of(convert)),
            "output": None if out is None else str(out),
            "layout": list(layout.layer_types),
            "picture": layout.picture(),
            "mixer": plan.config.mixer_in_words if layout.linear else None,
            "tensors": {"kept": plan.count("copy") + plan.count("cast"), "new": plan.count("new")},
            "bytes": plan.num_bytes,
            "dropped": plan.dropped,
            "notes": plan.notes,
        }
        if dry_run:
            report["plan"] = [
                [move.source, move.describe(), move.target, list(move.shape), move.num_bytes] for move in plan.moves
            ]
            return _timed(report, start)
        _refuse_full_disk(out, plan.num_bytes)
        overrides = {}
        report["closeness"] = None
        store = out.absolute().with_name(f".{out.name}.calibration")
        try:
            with _saying_what_stays(store):
                if layout.linear and tuple(calibrate) != ("none",):
                    overrides, report["closeness"], report["calibration"] = _calibrate(
                        opened.folder, plan, tokenizer, calibrate, held_out, seed, store, where
                    )
                with Staging(out, overwrite) as staging:
                    with progress("writing", plan.num_bytes / 1e6, "MB") as advance:
                        written = execute(
                            plan,
                            checkpoint,
                            staging.folder,
                            max_shard_size=limit,
                            overrides=overrides,
                            advance=lambda num_bytes: advance(num_bytes / 1e6),
                        )
                    report["tensors"] = {
                        "kept": written.kept,
                        "kept_identical": written.kept_identical,
                        "refitted": written.refitted,
                        "new": written.new,
                    }
                    _timed(report, start)
                    _write_companions(opened, plan, staging.folder, written, report)
                    staging.commit()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"-o {out}: the disk is full ({plan.num_bytes:,} bytes are needed)") from None
            if error.errno == errno.EFBIG:
                raise UserError(f"-o {out}: the disk takes no file so large; give a smaller --max-shard-size") from None
            raise
    shutil.rmtree(store, ignore_errors=True)
    return _timed(report, start)


def mixer_options(
    mixer: str | None,
    state_heads: str | None,
    state_positions: str | None,
    feature_map: str | None,
    skip_conv: int | None,
    local_window: int | None,
    conv: int | None,
    gate: str | None,
    beta_range: int | None,
    compat: str | None = None,
) -> dict:
    """Arguments of `student_config` from the options of the command line, None where one is not given. Raises
    UserError naming the option."""
    given = {
        "mixer": mixer,
        "state_heads": state_heads,
        "state_positions": state_positions,
        "feature_map": feature_map,
        "skip_conv": skip_conv,
        "local_window": local_window,
        "conv": conv,
        "gate": gate,
        "beta_range": beta_range,
    }
    settled = resolve(compat, given)
    options = {
        "mixer": _one_of("--mixer", settled["mixer"], MIXERS),
        "state_heads": _one_of("--state-heads", settled["state_heads"], STATE_HEADS),
        "state_positions": _one_of("--state-positions", settled["state_positions"], STATE_POSITIONS),
        "feature_map": _one_of("--feature-map", settled["feature_map"], FEATURE_MAPS),
        "skip_taps": _at_least("--skip-conv", settled["skip_conv"], 0),
        "local_window": _at_least("--local-window", settled["local_window"], 0),
        "conv_kernel": _at_least("--conv", settled["conv"], 0),
        "beta_max": _one_of("--beta-range", settled["beta_range"], (1, 2)),
    }
    options["read_gate"], options["output_gate"] = GATES[_one_of("--gate", settled["gate"], tuple(GATES))]
    window, taps = options["local_window"], options["skip_taps"]
    if window and not options["read_gate"]:
        raise UserError(f"--local-window {window}: --gate {settled['gate']} has no read gate; give --gate read or both")
    if 0 < window < taps:
        raise UserError(f"--local-window {window}: allowed are 0 (off), or the {taps} of --skip-conv and more")
    return options | (FIELDS[compat] if compat else {})


def run(arguments) -> None:
    """The command line: converts, then prints the plan or a summary, or with --json the report as one object; or
    ranks layers, verifies, or writes a student in another format."""
    others = ("debug", "json", "verify", "rank", "format")
    options = {key: value for key, value in vars(arguments).items() if key not in others}
    if arguments.verify:
        for other in ("rank", "format"):
            if getattr(arguments, other) is not None:
                raise UserError(f"--{other} {getattr(arguments, other)}: --verify only checks a folder")
        _verify(options, arguments.json)
        return
    if arguments.rank is not None:
        if arguments.format is not None:
            raise UserError(f"--format {arguments.format}: --rank writes no student")
        from .ranking.command import run as run_ranking

        run_ranking(arguments.rank, options, arguments.json)
        return
    if arguments.output is None and not arguments.dry_run:
        raise UserError("-o OUT: missing; it names the student's folder, which must not exist")
    if arguments.format is not None:
        _write_format(arguments.format, options, arguments.json)
        return
    report = convert(**options)
    if arguments.json:
        print(json.dumps(report))
        return
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(describe(report))


def _verify(options: dict, as_json: bool) -> None:
    from .publish.verify import verify

    _refuse_others(options, (), f"--verify only checks the folder {options['source']} and takes no other option")
    found = verify(options["source"])
    if as_json:
        print(json.dumps(asdict(found) | {"folder": str(found.folder)}))
    found.refuse()
    if not as_json:
        print(found.describe())


def _write_format(name: str, options: dict, as_json: bool) -> None:
    from .formats import write_format

    _refuse_others(options, ("output", "overwrite"), f"--format {name} only writes the student again, as it is")
    output = str(write_format(options["source"], options["output"], name, overwrite=options["overwrite"]))
    print(json.dumps({"format": name, "output": output}) if as_json else f"{name:<8} {output}")


def _refuse_others(options: dict, allowed: tuple[str, ...], why: str) -> None:
    """Raises UserError for the first option, not among those allowed, that is not at its default."""
    for key, default in {"output": None, **defaults_of(convert)}.items():
        if key not in allowed and list_of(options[key]) != list_of(default):
            raise UserError(f"{'-o' if key == 'output' else option(key)}: {why}")


def defaults_of(function: Callable) -> dict[str, object]:
    """The optional arguments of a function and their default values."""
    parameters = inspect.signature(function).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.default is not entry.empty}


def describe(report: dict) -> str:
    """The report as text for people."""
    tensors = report["tensors"]
    lines = [f"layers   {report['picture']}", f"mixer    {report['mixer'] or 'none: no layer is linear'}"]
    if "plan" in report:
        width = max(len(target) for _, _, target, _, _ in report["plan"])
        for source, operation, target, shape, num_bytes in report["plan"]:
            size = "x".join(map(str, shape))
            same = "" if source in (None, target) else f"  from {source}"
            lines.append(f"{target:<{width}}  {size:>14}  {num_bytes:>13,} B  {operation}{same}")
        lines += [f"{name}  dropped: {reason}" for name, reason in report["dropped"].items()]
        lines.append(
            f"{tensors['kept']} tensors kept, {tensors['new']} new, {report['bytes']:,} bytes; "
            "nothing calibrated or written"
        )
        return "\n".join(lines)
    kept = f"{tensors['kept']} kept ({tensors['kept_identical']} byte-identical)"
    refitted = f", {tensors['refitted']} refitted" if tensors["refitted"] else ""
    lines.append(f"tensors  {kept}{refitted}, {tensors['new']} new, {report['bytes']:,} bytes")
    lines += [f"dropped  {name}: {reason}" for name, reason in report["dropped"].items()]
    if report["closeness"] is not None:
        from .closeness import as_markdown

        lines += ["", as_markdown(report["closeness"])]
    lines.append(f"took     {report['seconds']:.1f} s, peak memory {report['peak_rss_mb']:,.0f} MB")
    lines.append(f"student  {report['output']}")
    return "\n".join(lines)


def load_tokenizer(folder: Path):
    """The tokenizer of a checkpoint folder, or None where it has no tokenizer files. Raises UserError if unreadable."""
    from deltanet.generate import TOKENIZERS

    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise many kinds; each means the same to the user
        raise UserError(f"{folder}: unreadable tokenizer: {one_line(error)}") from None


def _calibrate(
    folder: Path, plan: Plan, tokenizer, texts: Sequence[str], held_out: str | None, seed: int, store: Path, device
) -> tuple[dict, dict | None, dict]:
    """(new values by tensor name, the closeness report, the calibration's own report). Finished layers are kept in
    `store` until all is done. The student is measured as it will be written, in its own dtype."""
    import torch

    from .calibrate import calibrate
    from .closeness import VARIANTS, closeness
    from .loading import load_teacher, student_from_teacher
    from .text import calibration_text

    teacher = load_teacher(folder, torch.float32).to(device)
    with progress("writing the calibration text", texts.count("self")) as advance:
        text = calibration_text(texts, held_out, tokenizer, teacher, seed=seed, advance=advance)
    # A copy, since a model in memory sets the dtype of its configuration to its own.
    student = student_from_teacher(teacher, copy.deepcopy(plan.config), share=True)
    with progress("calibrating", plan.config.num_hidden_layers, "layers") as advance:
        fitted = calibrate(teacher, student, text.fit, folder=store, advance=advance)
    state, overrides = student.state_dict(), {}
    for move in plan.moves:
        layer = int(move.target.split(".")[2]) if move.target.startswith("model.layers.") else None
        is_linear = layer is not None and plan.config.layer_types[layer] == LINEAR
        if is_linear and (move.operation == "new" or ".o_proj." in move.target):
            overrides[move.target] = state[move.target].to("cpu", move.dtype)
            state[move.target].copy_(overrides[move.target])
    if not len(text.held_out):
        plan.notes.append("the text was too short to set any aside, so closeness was not measured; see --held-out")
        return overrides, None, fitted
    with progress("measuring closeness", 4 + len(VARIANTS), "steps") as advance:
        measured = closeness(teacher, student, text.held_out, seed=seed, advance=advance)
    return overrides, measured, fitted


@contextlib.contextmanager
def _saying_what_stays(store: Path) -> Iterator[None]:
    """Left before its end, however, a conversion says which layers it need not fit again, and where they are."""
    try:
        yield
    except BaseException:
        if count := len(list(store.glob("layer-*.pt"))):
            print(f"fitted layers kept in {store}: {count}; the same command goes on from them", file=sys.stderr)
        else:
            shutil.rmtree(store, ignore_errors=True)
        raise


def _write_companions(opened: Source, plan: Plan, folder: Path, written: Written, report: dict) -> None:
    """config.json, the source's tokenizer, templates and licences byte for byte, what a reader needs beside them, the
    record, the card, and last the manifest."""
    write_small(folder, "config.json", plan.config.to_json_string(use_diff=False), written)
    for pattern in COMPANIONS:
        for path in sorted(opened.folder.glob(pattern)):
            if path.is_file():
                write_small(folder, str(path.relative_to(opened.folder)), path.read_bytes(), written)
    load_tokenizer(folder)
    if GENERATION not in written.files:
        from transformers import GenerationConfig

        write_small(folder, GENERATION, GenerationConfig.from_model_config(plan.config).to_json_string(), written)
    notice = from_head(report["licence_metadata"]).notice if report["licence_metadata"] else None
    if notice and not any(name.startswith("NOTICE") for name in written.files):
        write_small(folder, "NOTICE", notice + "\n", written)
    if report["closeness"] is not None:
        from .closeness import files

        for name, content in files(report["closeness"]).items():
            write_small(folder, name, content, written)
    record = report | {"source": public_name(opened), "output": Path(report["output"]).name}
    write_small(folder, RECORD, json.dumps(record, indent=2) + "\n", written)
    write_small(folder, README, make_card(folder), written)
    write_small(folder, MANIFEST, as_manifest(written.files), written)


def _refuse_full_disk(out: Path, num_bytes: int) -> None:
    parent = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(f"-o {out}: the disk is full: {num_bytes:,} bytes are needed, {free:,} are free in {parent}")


def _one_of(option: str, value, allowed: tuple):
    if value not in allowed:
        names = [str(name) for name in allowed]
        raise UserError(f"{option} {value}: allowed are {', '.join(names)}{nearest(str(value), names)}")
    return value


def _at_least(option: str, value: int, low: int) -> int:
    if value < low:
        raise UserError(f"{option} {value}: allowed is {low} (off) or more")
    return value


def _timed(report: dict, start: float) -> dict:
    report["seconds"] = round(time.monotonic() - start, 3)
    report["peak_rss_mb"] = round(_peak_memory() / 1e6, 1)
    return report


def _peak_memory() -> int:
    """Bytes this process had in memory at most. Linux' own mark, since getrusage's is inherited from the parent."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
