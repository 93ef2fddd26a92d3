"""`deltanet-convert STUDENT -o OUT --format NAME`: a student's folder once more, in a form that others load.

Twin: tests/convert/formats/test_format_command.py.
"""

import errno
import json
import shutil
from pathlib import Path

from transformers.utils import logging

from deltanet import DeltaNetConfig, load_student
from deltanet.errors import UserError, nearest

from ..families import read_config
from ..links import leaves
from ..publish.files import is_published
from ..publish.manifest import MANIFEST, files_in, seal
from ..staging import Staging, check_target
from .remote_code import AUTO_MAP, remote_code

FORMATS = ("remote",)


def write_format(student: str | Path, output: str | Path, name: str, *, overwrite: bool = False) -> Path:
    """Writes the folder `student` to the folder `output` in the format `name` and returns `output`.

    remote: the same weights, and the code that loads them beside them. Of the rest, what a push would send is copied,
    and no code that stood in `student`. Raises UserError for a name that does not
    exist, a folder that is no whole student, an `output` that may not be written, and a full disk; then nothing is
    left at `output`.
    """
    student, output = Path(student), Path(output)
    if name not in FORMATS:
        raise UserError(f"--format {name}: allowed: {', '.join(FORMATS)}{nearest(name, list(FORMATS))}")
    raw = read_config(student)
    if raw.get("model_type") != DeltaNetConfig.model_type:
        raise UserError(
            f"{student}: --format takes a student, of model_type {DeltaNetConfig.model_type!r}; "
            f"this is {raw.get('model_type')!r}"
        )
    check_target(output, overwrite, student)
    logging.disable_progress_bar()
    load_student(student)
    try:
        with Staging(output, overwrite) as staging:
            for file, path in files_in(student):
                if file != MANIFEST and not file.endswith(".py") and is_published(file, student):
                    if leaves(student, path):
                        raise UserError(f"{path}: a link to {path.resolve()}, outside the student's folder")
                    target = staging.folder / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            for file, source in remote_code().items():
                (staging.folder / file).write_text(source, encoding="utf-8")
            config = json.dumps(raw | {"auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n"
            (staging.folder / "config.json").write_text(config, encoding="utf-8")
            load_student(staging.folder)
            seal(staging.folder)
            staging.commit()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"-o {output}: the disk is full") from None
        raise
    return output
