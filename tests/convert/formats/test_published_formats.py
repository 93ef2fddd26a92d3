"""A student in every format: verified, sent to a Hub, pulled back with the same bytes, and with a card of its own."""

import json
import os
import re
import subprocess
import sys
import sysconfig

import pytest
from exportable import exportable
from huggingface_hub import snapshot_download
from loopback_hub import hub  # noqa: F401
from published import files_of, make_source

from convert import convert
from convert.formats import write_format
from convert.publish.push import push
from convert.publish.verify import verify

LOADS = {"remote": "trust_remote_code=True", "fla": "import fla", "qwen3_5": "With transformers alone"}


@pytest.mark.parametrize("form", LOADS)
def test_what_is_pulled_has_the_bytes_that_were_written(hub, tmp_path, form):  # noqa: F811
    convert(make_source(tmp_path / "teacher"), tmp_path / "student", hybrid="layers:1", calibrate=["none"])
    if form != "remote":
        vocabulary = json.loads((tmp_path / "student" / "config.json").read_text())["vocab_size"]
        exportable(form, vocab_size=vocabulary).save_pretrained(tmp_path / "student")
        (tmp_path / "student" / "manifest.json").unlink()
    out = write_format(tmp_path / "student", tmp_path / "out", form)
    assert verify(out).problems == []
    card = (out / "README.md").read_text()
    assert LOADS[form] in card
    assert "import deltanet" not in card
    push(out, f"tester/{form}")
    snapshot_download(f"tester/{form}", local_dir=tmp_path / "pulled")
    pulled = {name: data for name, data in files_of(tmp_path / "pulled").items() if not name.startswith(".")}
    assert pulled == files_of(out)


@pytest.mark.parametrize("form", ["remote", "qwen3_5"])
def test_the_code_of_the_card_runs_where_the_package_is_absent(tmp_path, form):
    convert(make_source(tmp_path / "teacher"), tmp_path / "student", hybrid="layers:1", calibrate=["none"])
    if form == "qwen3_5":
        vocabulary = json.loads((tmp_path / "student" / "config.json").read_text())["vocab_size"]
        exportable(form, vocab_size=vocabulary).save_pretrained(tmp_path / "student")
    out = write_format(tmp_path / "student", tmp_path / "out", form)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    # -S keeps .pth files, and so an editable install, from being read.
    start = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); FOLDER = {str(out)!r}\n"
    end = "\nassert not any(name.split('.')[0] == 'deltanet' for name in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code + end],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
