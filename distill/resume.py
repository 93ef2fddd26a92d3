"""Where a run is on disk, and where it goes on: only with a recipe that computes the same.

Twins: tests/distill/test_dry_run.py, tests/distill/test_run.py.
"""

from collections.abc import Callable
from pathlib import Path

from deltanet_errors import UserError

from .commit import MANIFEST, Commit, newest_commit, verify
from .output import output_folder
from .paths import check_texts
from .recipe import changes, load_recipe
from .schema import Recipe

RECIPE = "recipe.yaml"
COMMITS = "commits"
SHOWN = 8  # differences in a message


def run_folder(recipe: str | Path, output: str | Path | None) -> Path:
    """The folder of the run of the recipe with this path or name: `output`, else runs/NAME. Raises UserError where
    nothing could be written there."""
    return output_folder(Path("runs") / Path(recipe).stem if output is None else output)


def check_recipe_unchanged(folder: Path, recipe: Recipe) -> None:
    """Raises UserError with the differences where the run in `folder` was started with another recipe."""
    if not (folder / RECIPE).is_file():
        return
    differences = changes(load_recipe(folder / RECIPE), recipe)
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UserError(
            f"{folder}: the run was started with another recipe: {'; '.join(differences[:SHOWN])}{more}. "
            "Change it back, or give the new recipe an --output of its own"
        )


def check_resume(recipe: Recipe, run: Path, resume: str) -> None:
    """Raises UserError where the run was started with another recipe, and where `--resume`, as in `find_commit`, names
    nothing to go on from: `never` finds a commit, or PATH is none or of a run with another recipe."""
    check_recipe_unchanged(run, recipe)
    if resume == "never":
        found = newest_commit(run / COMMITS, report=lambda damage: None)
        if found is not None:
            raise UserError(f"--resume never: {run} holds the commit {found.folder.name}; use another --output")
    elif resume != "auto":
        folder, allowed = Path(resume), f"say auto, never or a folder in {run / COMMITS}"
        if not resume or not folder.is_dir():
            raise UserError(f"--resume {resume}: no such commit; {allowed}")
        if not (folder / MANIFEST).is_file():
            raise UserError(f"--resume {resume}: no commit (no {MANIFEST}); {allowed}")
        check_recipe_unchanged(folder.absolute().parent.parent, recipe)


def find_commit(recipe: Recipe, run: Path, resume: str, report: Callable[[str], None]) -> Commit | None:
    """The commit that a run with `--resume` as given goes on from: auto, never or the folder of one. None: a fresh run.

    `report` is told of damaged ones passed over. Raises as `check_resume`, and Damaged where PATH does not verify.
    """
    check_resume(recipe, run, resume)
    if resume == "never":
        return None
    return newest_commit(run / COMMITS, report=report) if resume == "auto" else verify(Path(resume))


def outlook(recipe: Recipe, run: Path, resume: str, report: Callable[[str], None]) -> str:
    """What a run would begin with, in a line; raises as the run would. Nothing is changed."""
    commit = find_commit(recipe, run, resume, report)
    if commit is None:
        check_texts(recipe, run)
        return f"run      {run}: begins with the first step"
    marks = commit.info["marks"]
    return f"run      {run}: goes on from {commit.folder}, where {marks['stage']} has done {marks['step']} steps"
