"""Where a run is on disk, and where it goes on. Twins: tests/distill/test_dry_run.py, tests/distill/test_run.py."""

from collections.abc import Callable
from pathlib import Path

from deltanet.errors import UserError

from .commit import Commit, newest_commit, verify
from .records import check_recipe_unchanged
from .schema import Recipe

COMMITS = "commits"


def run_folder(recipe: str | Path, output: str | Path | None) -> Path:
    """The folder of the run of the recipe with this path or name: `output`, else runs/NAME."""
    return Path(output) if output is not None else Path("runs") / Path(recipe).stem


def find_commit(run: Path, resume: str, report: Callable[[str], None]) -> Commit | None:
    """The commit that a run with `--resume` as given goes on from: auto, never or the folder of one. None: a fresh run.

    `report` is told of damaged ones passed over. Raises UserError where `never` finds one or PATH is none, Damaged
    where PATH does not verify.
    """
    if resume in ("auto", "never"):
        found = newest_commit(run / COMMITS, report=report)
        if resume == "never" and found is not None:
            raise UserError(f"--resume never: {run} holds the commit {found.folder.name}; use another --output")
        return found
    if not Path(resume).is_dir():
        raise UserError(f"--resume {resume}: no such commit; say auto, never or a folder in {run / COMMITS}")
    return verify(Path(resume))


def outlook(recipe: Recipe, run: Path, resume: str, report: Callable[[str], None]) -> str:
    """What a run would begin with, in a line; raises as the run would. Nothing is changed."""
    check_recipe_unchanged(run, recipe)
    commit = find_commit(run, resume, report)
    if commit is None:
        return f"run      {run}: begins with the first step"
    marks = commit.info["marks"]
    return f"run      {run}: goes on from {commit.folder}, where {marks['stage']} has done {marks['step']} steps"
