"""Where a run is on disk, and where it goes on. Twins: tests/distill/test_dry_run.py, tests/distill/test_run.py."""

from collections.abc import Callable
from pathlib import Path

from deltanet_errors import UserError

from .commit import MANIFEST, Commit, newest_commit, verify
from .first_student import check_texts
from .output import output_folder
from .records import check_recipe_unchanged
from .schema import Recipe

COMMITS = "commits"


def run_folder(recipe: str | Path, output: str | Path | None) -> Path:
    """The folder of the run of the recipe with this path or name: `output`, else runs/NAME. Raises UserError where
    nothing could be written there."""
    return output_folder(Path("runs") / Path(recipe).stem if output is None else output)


def find_commit(recipe: Recipe, run: Path, resume: str, report: Callable[[str], None]) -> Commit | None:
    """The commit that a run with `--resume` as given goes on from: auto, never or the folder of one. None: a fresh run.

    `report` is told of damaged ones passed over. Raises UserError where the run was started with another recipe, where
    `never` finds one, and where PATH is none or of a run with another recipe; Damaged where PATH does not verify.
    """
    check_recipe_unchanged(run, recipe)
    if resume in ("auto", "never"):
        found = newest_commit(run / COMMITS, report=report)
        if resume == "never" and found is not None:
            raise UserError(f"--resume never: {run} holds the commit {found.folder.name}; use another --output")
        return found
    folder = Path(resume)
    if not resume or not folder.is_dir():
        raise UserError(f"--resume {resume}: no such commit; say auto, never or a folder in {run / COMMITS}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--resume {resume}: no commit (no {MANIFEST}); say auto, never or a folder in {run / COMMITS}")
    found = verify(folder)
    check_recipe_unchanged(folder.absolute().parent.parent, recipe)
    return found


def outlook(recipe: Recipe, run: Path, resume: str, report: Callable[[str], None]) -> str:
    """What a run would begin with, in a line; raises as the run would. Nothing is changed."""
    commit = find_commit(recipe, run, resume, report)
    if commit is None:
        check_texts(recipe, run)
        return f"run      {run}: begins with the first step"
    marks = commit.info["marks"]
    return f"run      {run}: goes on from {commit.folder}, where {marks['stage']} has done {marks['step']} steps"
