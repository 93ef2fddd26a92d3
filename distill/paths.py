"""The files and folders that a recipe names, looked for before a run makes anything, and before seconds go into torch.

Twin: tests/distill/test_checks.py.
"""

import filecmp
from pathlib import Path

from convert.text_files import WORDS, check_file
from deltanet_errors import UserError

from .documents import find_files
from .output import check_folder
from .recipe_rules import trained_sources
from .schema import Recipe


def check_paths(recipe: Recipe) -> None:
    """Raises UserError for a source whose files are not there or none that can be read, for a file to be measured on
    that is trained on too, and where the folder of the teacher's cache cannot be written."""
    files = {source.name: find_files(source) for source in recipe.data.sources}
    read = trained_sources(recipe)
    used = [
        (file, source.field, f"the stages train on, as source {source.name}")
        for source in read
        for file in files[source.name]
    ]
    if recipe.student.convert is not None:
        fitted = [Path(name) for name in recipe.student.convert.calibrate if name not in WORDS]
        used += [(file, None, "student.convert.calibrate fits on") for file in fitted if file.is_file()]
    for source in recipe.evaluation.sources:
        for file in find_files(source):
            for other, field, by in used:
                other_column = None not in (field, source.field) and field != source.field
                if not other_column and _same_bytes(file, other):
                    raise UserError(
                        f"evaluation.sources: source {source.name}: {file} is the very text that {by}; give it text of "
                        "its own, or leave evaluation.sources out, and data.held_out keeps a part of every source"
                    )
    if recipe.teacher is not None and recipe.teacher.cache is not None and recipe.teacher.cache.folder is not None:
        check_folder(Path(recipe.teacher.cache.folder), "teacher.cache.folder")


def _same_bytes(file: Path, other: Path) -> bool:
    return file.samefile(other) or (
        file.stat().st_size == other.stat().st_size and filecmp.cmp(file, other, shallow=False)
    )


def check_texts(recipe: Recipe, run: Path) -> None:
    """Raises UserError where a student is to be converted and a text to fit it on cannot be read."""
    wish = recipe.student.convert
    if wish is None or (student_folder(recipe, run) / "config.json").is_file():
        return
    for name in wish.calibrate:
        check_file(name, f"student.convert.calibrate: {name}", WORDS)
    if wish.held_out is not None:
        check_file(wish.held_out, f"student.convert.held_out: {wish.held_out}")


def student_folder(recipe: Recipe, run: Path) -> Path:
    """Where the student is, or will be."""
    return Path(recipe.student.model) if recipe.student.model is not None else run / "student"
