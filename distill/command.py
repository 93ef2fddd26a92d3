"""What the command line calls: prints the recipe, or the plan of a run, or runs it.

Twin: tests/distill/test_dry_run.py.
"""

import tempfile
from pathlib import Path

from .recipe import load_recipe, show


def run(arguments) -> None:
    if arguments.print_config:
        print(show(load_recipe(arguments.recipe, arguments.overrides)), end="")
    elif arguments.dry_run:
        from .dry_run import describe

        with tempfile.TemporaryDirectory(prefix="deltanet-plan-") as folder:
            print(describe(load_recipe(arguments.recipe, arguments.overrides), Path(folder)))
    else:
        from .run import distil

        distil(arguments.recipe, arguments.overrides, output=arguments.output, resume=arguments.resume)
