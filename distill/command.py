"""What the command line calls: prints the recipe, or the plan of a run, or runs it.

Torch and what stands on it take seconds to import, so what needs none of it is checked first: a mistake in the recipe,
its texts, -o or --resume is told at once. Twins: tests/test_cli.py, tests/distill/test_dry_run.py.
"""

import os
import sys
import tempfile
from pathlib import Path

from .broken_pipe import outliving_readers
from .paths import check_paths, check_texts
from .recipe import load_recipe, show
from .resume import check_resume, outlook, run_folder
from .schema import Recipe


def run(arguments) -> None:
    if arguments.print_config:
        print(show(load_recipe(arguments.recipe, arguments.overrides)), end="")
    elif arguments.dry_run:
        _dry_run(arguments)
    else:
        with outliving_readers():
            _distil(arguments)


def _read(arguments) -> tuple[Recipe, Path]:
    """The recipe and the folder of its run. Raises UserError for what is wrong with them as far as it shows without
    torch; of several processes one looks for that, and only when they have met (`run.py`)."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = run_folder(arguments.recipe, arguments.output)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        check_resume(recipe, folder, arguments.resume)
        check_paths(recipe)
        check_texts(recipe, folder)
    return recipe, folder


def _dry_run(arguments) -> None:
    recipe, folder = _read(arguments)
    from .dry_run import describe

    begins = outlook(recipe, folder, arguments.resume, lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="deltanet-plan-") as cache:
        print(f"{begins}\n{describe(recipe, Path(cache))}")


def _distil(arguments) -> None:
    """Of several processes one tells what went wrong; the others end with its exit code and without a word."""
    try:
        recipe, folder = _read(arguments)
        from .run import carry_out
        from .world import leave_world

        try:
            carry_out(recipe, folder, arguments.resume)
        finally:
            leave_world()
    except Exception as error:
        if getattr(error, "is_echo", os.environ.get("RANK", "0") != "0"):
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise
