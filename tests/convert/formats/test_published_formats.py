"""A student in every format: verified, sent to a Hub, pulled back with the same bytes, and with a card of its own."""

import json

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
