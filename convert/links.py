"""Links in a checkpoint folder. One that leads out of it could carry a private file into what people publish.

The Hub's cache is the exception: there every file of `snapshots/COMMIT` is a link into `blobs` beside it, which may be
one into the `blobs` that all repositories share.
Twin: tests/convert/test_links.py.
"""

import os
import re
from pathlib import Path

from deltanet_errors import UserError

SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def leaves(folder: Path, path: Path) -> bool:
    """Whether `path`, a file of `folder`, is really somewhere else: neither in the folder nor in its Hub cache."""
    home, real = (Path(os.path.realpath(each)) for each in (folder, path))  # which takes a loop too
    if real.is_relative_to(home):
        return False
    if home.parent.name != "snapshots" or not home.parent.parent.name.startswith("models--"):
        return True
    repository = home.parent.parent
    return real.parent != repository / "blobs" and not (
        real.parent.parent == repository.parent / "blobs" and SHARED.fullmatch(f"{real.parent.name}/{real.name}")
    )


def refuse_links_out(folder: Path, patterns: tuple[str, ...]) -> None:
    """Raises UserError for the first file of `folder` that matches a pattern and leads out of it."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path}: a link that leads nowhere")
            if leaves(folder, path):
                raise UserError(f"{path}: a link to {path.resolve()}, outside the checkpoint; put a copy in its place")
