"""Which links of a checkpoint folder lead out of it: the Hub's cache is the one exception."""

import pytest

from convert.links import leaves, refuse_links_out
from deltanet_errors import UserError


@pytest.fixture
def cache(tmp_path):
    """A folder of the Hub's cache, with a file of each kind of blob."""
    home = tmp_path / "cache" / "models--a--b" / "snapshots" / "rev"
    home.mkdir(parents=True)
    own = home.parent.parent / "blobs" / "e1"
    shared = tmp_path / "cache" / "blobs" / "ab" / ("a" * 64)
    for path in (own, shared, tmp_path / "cache" / "other"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return home


def test_files_and_links_within_the_folder_stay(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert not leaves(tmp_path, tmp_path / "a")
    assert not leaves(tmp_path, tmp_path / "b")
    (tmp_path.parent / "alias").symlink_to(tmp_path)
    assert not leaves(tmp_path.parent / "alias", tmp_path.parent / "alias" / "b")


def test_links_out_of_the_folder_leave_by_whatever_way(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "direct").symlink_to(tmp_path / "secret")
    (folder / "relative").symlink_to("../secret")
    (folder / "twice").symlink_to("relative")
    (folder / "dangling").symlink_to("/nowhere/x")
    for name in ("direct", "relative", "twice", "dangling"):
        assert leaves(folder, folder / name), name
    with pytest.raises(UserError, match=r"direct: a link to .*secret, outside the checkpoint; put a copy"):
        refuse_links_out(folder, ("none", "di*"))


def test_the_hubs_cache_may_link_to_its_blobs_and_to_the_shared_ones_and_nowhere_else(cache):
    for target, leaving in (
        ("../../blobs/e1", False),
        (f"../../../blobs/ab/{'a' * 64}", False),
        ("../../../other", True),
        ("../../../../secret", True),
        ("../../blobs/../../other", True),
    ):
        link = cache / "file"
        link.symlink_to(target)
        assert leaves(cache, link) == leaving, target
        link.unlink()
