"""SOURCE as a Hub id, through the real library to a Hub on loopback: cache, revision, resume, gates, broken lines."""

import pytest
from huggingface_hub import constants
from loopback_hub import Fault, sha256
from published import files_of

from convert import convert
from convert.publish.push import push
from convert.publish.verify import verify
from convert.sources import open_source
from deltanet_errors import UserError

NAME = "tester/teacher"


@pytest.fixture
def published(source, hub, monkeypatch):
    """A teacher on the Hub, public; nobody is logged in."""
    monkeypatch.delenv("HF_TOKEN")
    hub.create(
        NAME, files_of(source) | {"optimizer.pt": b"not wanted", "pytorch_model.bin": b"\x80\x04"}, private=False
    )
    return hub


def downloads(hub) -> list[str]:
    return [path.rpartition("/")[2] for path in hub.paths("GET") if "/resolve/" in path or "/storage/" in path]


def test_a_conversion_from_the_hub_is_that_of_the_folder_and_names_its_base(published, source, tmp_path):
    report = convert(NAME, tmp_path / "from-hub", calibrate=["none"])
    convert(source, tmp_path / "from-folder", calibrate=["none"])
    one, other = files_of(tmp_path / "from-hub"), files_of(tmp_path / "from-folder")
    for name in one.keys() - {"README.md", "conversion.json", "manifest.json"}:
        assert one[name] == other[name], name
    assert report["base_model"] == NAME
    assert report["revision"] == published.repositories[NAME].branches["main"]
    assert "base_model: tester/teacher" in one["README.md"].decode()
    assert "optimizer.pt" not in downloads(published)
    assert "pytorch_model.bin" not in downloads(published)
    assert verify(tmp_path / "from-hub").problems == []


def test_a_second_conversion_downloads_nothing_and_offline_it_still_works(published, tmp_path, monkeypatch):
    convert(NAME, tmp_path / "one", calibrate=["none"])
    before = len(downloads(published))
    convert(NAME, tmp_path / "two", calibrate=["none"])
    assert len(downloads(published)) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(NAME, tmp_path / "three", calibrate=["none"])
    assert len(downloads(published)) == before


def test_a_revision_is_a_branch_or_a_commit_and_stays_what_it_was(published, source, tmp_path):
    repository = published.repositories[NAME]
    first = repository.branches["main"]
    changed = files_of(source) | {"README.md": b"---\nlicense: mit\n---\n"}
    second = repository.commit("main", changed, "second")
    repository.branches["v2"] = second
    for revision, commit, licence in ((first, first, "llama3.2"), ("v2", second, "mit"), (None, second, "mit")):
        with open_source(NAME, revision) as opened:
            assert opened.revision == commit
            assert f"license: {licence}" in (opened.folder / "README.md").read_text()
    with pytest.raises(UserError, match=r"--revision v9: tester/teacher has no such branch, tag or commit"):
        convert(NAME, tmp_path / "s", revision="v9")


@pytest.mark.parametrize(
    "fault", [Fault(cut=1500), Fault(broken="before"), Fault(503), Fault(429, {"Retry-After": "3"})]
)
def test_a_download_that_breaks_once_goes_on_where_it_was(published, tmp_path, fault, monkeypatch):
    hit = []

    def once(request):
        if request.method == "GET" and "/storage/" in request.path and not hit:
            hit.append(request.path)
            return fault
        return None

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what has arrived is kept in pieces of that
    published.fault = once
    convert(NAME, tmp_path / "s", calibrate=["none"])
    assert hit
    assert verify(tmp_path / "s").problems == []
    if fault.cut:
        assert published.ranges == [f"bytes={fault.cut}-"]


def test_a_download_that_breaks_for_good_is_one_line_and_leaves_no_output_and_the_next_run_succeeds(
    published, source, tmp_path
):
    weights = sha256((source / "model.safetensors").read_bytes())
    published.fault = lambda request: Fault(broken="before") if weights in request.path else None
    with pytest.raises(UserError, match=r"tester/teacher: .*the Hub cannot be reached"):
        convert(NAME, tmp_path / "s", calibrate=["none"])
    assert not (tmp_path / "s").exists()
    published.fault = lambda request: None
    convert(NAME, tmp_path / "s", calibrate=["none"])
    assert verify(tmp_path / "s").problems == []


def test_a_damaged_download_of_the_right_size_is_not_taken_for_the_weights(published, source, tmp_path):
    """Storage gives other bytes than the list of files promises; safetensors' header catches only some of it, so the
    conversion compares what it read with what it wrote, and the manifest is of that."""
    weights = (source / "model.safetensors").read_bytes()
    published.fault = lambda request: None
    published.repositories[NAME].files()["model.safetensors"] = weights[:-2] + b"\xff\x7f"
    with pytest.raises(UserError, match="holds NaN"):
        convert(NAME, tmp_path / "s", calibrate=["none"])


def test_gated_private_and_absent_repositories_say_what_to_do(published, source, tmp_path, monkeypatch):
    published.create("tester/gated", files_of(source), private=False, gated=True)
    published.create("tester/private", files_of(source))
    for name, says in (
        (
            "tester/gated",
            r"tester/gated: gated; ask for access on .*, then log in with `hf auth login` or set HF_TOKEN",
        ),
        ("tester/private", "no such repository on the Hub, or a private one.*log in"),
        ("tester/absent", "no such repository on the Hub, or a private one"),
    ):
        with pytest.raises(UserError, match=says):
            convert(name, tmp_path / "s", calibrate=["none"])
    monkeypatch.setenv("HF_TOKEN", published.reader)
    with pytest.raises(UserError, match="tester/gated: gated; ask for access"):
        convert("tester/gated", tmp_path / "s", calibrate=["none"])
    convert("tester/private", tmp_path / "private", calibrate=["none"])
    monkeypatch.setenv("HF_TOKEN", published.token)
    convert("tester/gated", tmp_path / "gated", calibrate=["none"])
    assert not (tmp_path / "s").exists()


def test_storage_on_another_host_is_not_given_the_token(published, tmp_path, monkeypatch):
    """The loopback storage refuses requests that carry it."""
    monkeypatch.setenv("HF_TOKEN", published.token)
    convert(NAME, tmp_path / "s", calibrate=["none"])
    push(tmp_path / "s", "tester/llama-s")
    assert any("/storage/" in path for path in published.paths("PUT"))
    assert any("/storage/" in path for path in published.paths("GET"))


@pytest.mark.parametrize("path", ["../../evil.model", "/tmp/evil.model", "a/../../../evil.model", "..\\evil.model"])
def test_names_that_lead_out_of_the_cache_write_nothing(published, tmp_path, path):
    data = b"evil"
    published.repositories[NAME].files()[path] = data
    before = set(tmp_path.rglob("*evil*"))
    with pytest.raises(UserError, match=r"tester/teacher: the repository is refused: .*evil\.model"):
        convert(NAME, tmp_path / "s", calibrate=["none"])
    cache = tmp_path / "cache" / "models--tester--teacher"
    outside = [found for found in tmp_path.rglob("*evil*") if not found.resolve().is_relative_to(cache)]
    assert set(outside) <= before
