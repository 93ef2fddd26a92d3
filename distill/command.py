"""What the command line calls: prints the recipe, or the plan of a run, or runs it.

Torch and what stands on it take seconds to import, so the recipe is read first: a mistake in it is told at once.
Twin: tests/distill/test_dry_run.py.
"""

import os
import sys
import tempfile
from pathlib import Path

from .recipe import load_recipe, show


def run(arguments) -> None:
    if arguments.print_config:
        print(show(load_recipe(arguments.recipe, arguments.overrides)), end="")
    elif arguments.dry_run:
        _dry_run(arguments)
    else:
        _distil(arguments)


def _dry_run(arguments) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from .dry_run import describe
    from .resume import outlook, run_folder

    folder = run_folder(arguments.recipe, arguments.output)
    begins = outlook(recipe, folder, arguments.resume, lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="deltanet-plan-") as cache:
        print(f"{begins}\n{describe(recipe, Path(cache))}")


def _distil(arguments) -> None:
    """Of several processes one tells what went wrong; the others end with its exit code and without a word."""
    try:
        load_recipe(arguments.recipe, arguments.overrides)  # for its mistakes; `distil` reads it for itself
        from .run import distil
        from .world import leave_world

        try:
            distil(arguments.recipe, arguments.overrides, output=arguments.output, resume=arguments.resume)
        finally:
            leave_world()
    except Exception as error:
        if getattr(error, "is_echo", os.environ.get("RANK", "0") != "0"):
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise
