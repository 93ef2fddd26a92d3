"""The student a run starts from: a folder that is there, one converted from the teacher, or one made from nothing.

What a conversion was made of (its options, the teacher, the texts) is noted in the run's folder once the student is
there, so that one of an earlier try with another recipe is not taken for it. Twin: tests/distill/test_first_student.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

from convert.command import convert
from convert.families import teacher_config
from convert.layouts import parse_layout
from convert.plan import student_config
from deltanet import DeltaNetConfig
from deltanet_errors import UserError, one_line

from .new_student import mixer_fields, write_new
from .paths import check_texts, student_folder
from .records import checkpoint_digests, write_whole
from .resume import RECIPE
from .schema import Recipe
from .token_cache import file_digest

MADE_OF = "student.json"
# Of a configuration, what a file says of itself and not of the model.
_NOT_THE_MODEL = ("architectures", "dtype", "transformers_version", "_name_or_path", "auto_map")


def first_student(recipe: Recipe, run: Path, teacher: Path | None, say: Callable[[str], None]) -> Path:
    """The student's folder; it is made now where the recipe says how and it is not there.

    Until the run has started, a student of its own that another recipe made is made again. Raises UserError where
    `student.model` names no checkpoint, or one that is not what `student.convert` makes.
    """
    student, is_started = recipe.student, (run / RECIPE).is_file()
    folder = student_folder(recipe, run)
    is_there = (folder / "config.json").is_file()
    if student.new is not None:
        if not is_there or (student.model is None and not is_started):
            say(f"makes a student from nothing in {folder}")
            write_new(student.new, folder)
    elif student.convert is not None and not (is_there and is_started):
        _convert(recipe, run, teacher, say)
    else:
        check_there(folder)
    return folder


def check_there(folder: Path) -> None:
    """Raises UserError where the folder that `student.model` names holds no student."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"student.model: {folder} is not a checkpoint folder (no config.json), and no `convert:` makes it"
        )
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = found["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"student.model: {folder / 'config.json'} is no configuration: {one_line(error)}") from None
    if kind != DeltaNetConfig.model_type:
        raise UserError(f"student.model: {folder} is a {kind} and no student; `convert:` or deltanet-convert makes one")


def check_free(folder: Path) -> None:
    """Raises UserError where `student.model` names a folder without a student, in which none can be made."""
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise UserError(f"student.model: {folder} is there and no checkpoint; name a folder that is empty or not there")


def planned(recipe: Recipe, teacher: DeltaNetConfig) -> DeltaNetConfig:
    """The configuration of the student that `student.convert` makes."""
    wish = recipe.student.convert
    layout = parse_layout(wish.hybrid, teacher.layer_types, teacher.sliding_window, "student.convert.hybrid")
    return student_config(teacher, layout, **mixer_fields(wish))


def check_planned(recipe: Recipe, folder: Path, teacher: DeltaNetConfig) -> None:
    """Raises UserError where the checkpoint in `folder` is not the model that `student.convert` makes."""
    check_there(folder)
    wanted, found = planned(recipe, teacher).to_dict(), DeltaNetConfig.from_pretrained(folder).to_dict()
    for key in sorted(wanted.keys() - set(_NOT_THE_MODEL)):
        if found.get(key) != wanted[key]:
            raise UserError(
                f"student.model: {folder} is there and not what student.convert makes: its {key} is {found.get(key)}, "
                f"not {wanted[key]}. Name another folder, or leave `convert:` out"
            )


def _convert(recipe: Recipe, run: Path, teacher: Path, say: Callable[[str], None]) -> None:
    note, making, folder = run / MADE_OF, _made_of(recipe, teacher), student_folder(recipe, run)
    if (folder / "config.json").is_file():
        before = _noted(note)
        if before == making:
            return
        if recipe.student.model is not None:
            check_planned(recipe, folder, teacher_config(teacher))
            if before is not None:
                what = _differences(before, making)
                raise UserError(f"student.model: {folder} was made otherwise ({what}); delete it, or name another")
            return
        say(f"{folder} is of an earlier try ({_differences(before, making)}) and is made again")
    elif recipe.student.model is not None:
        check_free(folder)
    check_texts(recipe, run)
    note.unlink(missing_ok=True)
    say(f"converts {recipe.teacher.model} to {folder}")
    options = recipe.student.convert.model_dump()
    convert(recipe.teacher.model, folder, revision=recipe.teacher.revision, overwrite=True, **options)
    write_whole(note, json.dumps(making, indent=2))


def _made_of(recipe: Recipe, teacher: Path) -> dict:
    """What decides a converted student, as JSON: options by name, sha256 of the files of teacher, texts, ranking."""
    options = recipe.student.convert.model_dump(mode="json")
    named = [*options["calibrate"], options["held_out"], options["hybrid"].rpartition(":")[0]]
    files = {name: file_digest(Path(name)) for name in named if name and Path(name).is_file()}
    return {"convert": options, "teacher": checkpoint_digests(teacher), "file": files}


def _noted(note: Path) -> dict | None:
    """What the note says; None where it is not there or damaged."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _differences(before: dict | None, now: dict) -> str:
    if before is None:
        return "it is not noted what it was made of"
    return "; ".join(
        f"{kind} {name}: {_short(before[kind].get(name))} -> {_short(values.get(name))}"
        for kind, values in now.items()
        for name in sorted(values.keys() | before[kind].keys())
        if values.get(name) != before[kind].get(name)
    )


def _short(value: object) -> str:
    """A digest by its beginning."""
    text = "absent" if value is None else str(value)
    return f"{text[:8]}..." if len(text) == 64 else text
