"""What one process of test_resume.py does: whole runs through `distil`, one of them asked to stop on the way."""

import os
import signal


def work(rank: int, size: int, port: int, recipe: str, runs: list[tuple[str, list[str], tuple | None]]) -> None:
    """Entry of `torch.multiprocessing.spawn`. runs: (folder, overrides, (stage index, step) to be stopped at, or None).

    The signal goes to the last rank alone.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, size, "127.0.0.1", port))))
    import torch

    torch.set_num_threads(1)
    from deltanet_errors import Interrupted
    from distill import loop, report
    from distill.run import distil

    report._plot = lambda *_: None  # a second of matplotlib a run
    deal = loop.positions_of
    for folder, overrides, stop in runs:

        def positions_of(step, job, world, stop=stop):
            if stop == (job.index, step) and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return deal(step, job, world)

        loop.positions_of = positions_of
        try:
            distil(recipe, overrides, output=folder)
            assert stop is None, "the run should have been stopped"
        except Interrupted:
            assert stop is not None
    torch.distributed.destroy_process_group()
