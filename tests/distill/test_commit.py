"""Laws of commits: killed or out of space at any system call, or damaged in any way, a run finds a whole commit.

The system calls are counted in a forked child, which dies (SIGKILL) or fails (ENOSPC) at one of them; every one of
them is tried.
"""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal

import pytest

from deltanet_errors import DeltanetError, UserError
from distill import commit as commits
from distill.commit import Damaged, drop_newer, locked, newest_commit, verify, write_commit

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close")


def saver(step, size=9000):
    def save(folder):
        (folder / "nested").mkdir()
        for name in ("weights.bin", "nested/moments.bin"):
            with open(folder / name, "wb") as stream:
                stream.write(bytes([step % 251]) * size)

    return save


def commit(root, step, **options):
    return write_commit(root, step, saver(step), {"step": step}, **options)


def check_whole(found, steps):
    """The commit is one of `steps`, and its files are that step's."""
    assert found is not None
    assert found.step in steps
    assert found.info == {"step": found.step}
    for name in ("weights.bin", "nested/moments.bin"):
        assert (found.folder / name).read_bytes() == bytes([found.step % 251]) * 9000


def silent(_):
    pass


def test_a_commit_comes_back_with_its_step_files_and_info(tmp_path):
    assert newest_commit(tmp_path / "none") is None
    made = commit(tmp_path, 7)
    assert made.folder == tmp_path / "step-00000007"
    commit(tmp_path, 12)
    found = newest_commit(tmp_path)
    check_whole(found, {12})
    assert verify(made.folder).step == 7


def test_the_newest_is_by_number_and_retention_keeps_at_least_two(tmp_path):
    for step in (9, 10, 100, 20):
        commit(tmp_path, step, keep=1)
        assert len([*tmp_path.iterdir()]) <= 2
    assert newest_commit(tmp_path).step == 100
    commit(tmp_path, 101, keep=3)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000020", "step-00000100", "step-00000101"]


def test_damaged_commits_do_not_count_for_retention(tmp_path):
    for step in (1, 2, 3):
        commit(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "weights.bin").unlink()
    commit(tmp_path, 4, keep=2)
    assert verify(tmp_path / "step-00000002")
    assert not (tmp_path / "step-00000001").exists()


def test_a_step_can_be_committed_again(tmp_path):
    commit(tmp_path, 5)
    write_commit(tmp_path, 5, saver(5), {"step": 5, "second": True})
    assert newest_commit(tmp_path).info["second"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000005"]


def test_going_on_from_an_earlier_commit_drops_the_newer_ones(tmp_path):
    for step in (3, 6, 9):
        commit(tmp_path, step, keep=5)
    drop_newer(tmp_path, 6)
    assert newest_commit(tmp_path).step == 6


class Stop(Exception):
    pass


def instrument(act, at):
    """Replaces the system calls so that call number `at` acts; returns the counter. For a forked child."""
    count = [0]

    def wrap(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                act()
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    import builtins

    builtins.open = wrap(open)
    return count


def in_child(work):
    """Runs work() in a forked child; its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_calls(root, again):
    """System calls of the commit that the fault tests interrupt."""
    reading, writing = os.pipe()

    def work():
        pipe = os.fdopen(writing, "w")
        count = instrument(lambda: None, -1)
        commit(root, again, keep=2)
        print(count[0], file=pipe, flush=True)

    assert in_child(work) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


@pytest.mark.parametrize("again", [3, 2], ids=["new_step", "same_step"])
def test_kill_at_every_system_call_leaves_the_old_or_the_new_commit(tmp_path, again):
    start = tmp_path / "start"
    for step in (1, 2):
        commit(start, step)
    shutil.copytree(start, tmp_path / "count")
    total = count_calls(tmp_path / "count", again)
    assert total > 30
    ended = set()
    for at in range(1, total + 1):
        root = tmp_path / str(at)
        shutil.copytree(start, root)

        def work(root=root, at=at):
            instrument(lambda: os.kill(os.getpid(), signal.SIGKILL), at)
            commit(root, again)

        assert in_child(work) == -signal.SIGKILL
        found = newest_commit(root, report=silent)
        check_whole(found, {2, again})
        ended.add(found.step)
        commit(root, 4)  # the next run cleans up and goes on
        check_whole(newest_commit(root), {4})
        assert len([*root.iterdir()]) == 2
        shutil.rmtree(root)
    assert ended == {2, again}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_keeps_the_previous_commit_and_says_so(tmp_path, code):
    start = tmp_path / "start"
    for step in (1, 2):
        commit(start, step)
    shutil.copytree(start, tmp_path / "count")
    total = count_calls(tmp_path / "count", 3)

    def fail():
        raise OSError(code, os.strerror(code))

    for at in range(1, total + 1):
        root = tmp_path / str(at)
        shutil.copytree(start, root)

        def work(root=root, at=at):
            instrument(fail, at)
            try:
                commit(root, 3, report=silent)
            except DeltanetError as error:
                return 3 if os.strerror(code) in str(error) else 4
            return 0

        ended = in_child(work)
        assert ended in (0, 3), f"system call {at}"
        found = newest_commit(root, report=silent)
        # a failed sync of the parent, after the rename, is reported as a failure although the commit is there
        check_whole(found, {3} if ended == 0 else {2, 3})
        shutil.rmtree(root)


def test_a_writer_that_raises_leaves_no_trace(tmp_path):
    commit(tmp_path, 1)

    def save(folder):
        saver(2)(folder)
        raise RuntimeError("no tensor")

    with pytest.raises(RuntimeError, match="no tensor"):
        write_commit(tmp_path, 2, save)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("full_at", ["weights", "manifest"])
def test_a_disk_that_fills_while_writing_keeps_the_previous_commit(tmp_path, full_at):
    commit(tmp_path, 1)
    limit = 5000 if full_at == "weights" else 20000

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_commit(tmp_path, 2, saver(2), {"long": "x" * limit})
        except DeltanetError as error:
            return 3 if os.strerror(errno.EFBIG) in str(error) else 4

    assert in_child(work) == 3
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000001"]
    check_whole(newest_commit(tmp_path), {1})


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltanetError, match=r"Not a directory|File exists"):
        commit(tmp_path / "file" / "run", 1)


def test_one_rank_that_cannot_save_stops_every_rank(tmp_path):
    class Rank:
        """Rank 0 of two; the other one reports a failure."""

        is_main = True

        def gather(self, value):
            return [value, "No space left on device"]

        def broadcast(self, value):
            return value

    with pytest.raises(DeltanetError, match="rank 1: No space left"):
        commit(tmp_path, 1, ranks=Rank())
    assert [*tmp_path.iterdir()] == []


def damages(folder):
    """(description, damage) for every file: deleted, cut, bits flipped, a block zeroed, lengthened."""
    draw = random.Random(0)
    for name in ("weights.bin", "nested/moments.bin", "manifest.json"):
        file = folder / name
        size = file.stat().st_size
        yield f"{name} deleted", lambda file=file: file.unlink()
        for length in (0, size // 2, size - 1):
            yield f"{name} cut to {length}", lambda file=file, length=length: os.truncate(file, length)
        for offset in [0, size - 1, *(draw.randrange(size) for _ in range(62))]:
            bit = draw.randrange(8)
            yield (
                f"{name} bit {bit} of {offset}",
                lambda file=file, o=offset, b=bit: overwrite(file, o, bytes([file.read_bytes()[o] ^ 1 << b])),
            )
        yield f"{name} zeroed", lambda file=file, size=size: overwrite(file, 0, bytes(min(4096, size)))
        yield f"{name} longer", lambda file=file, size=size: overwrite(file, size, b"x")


def overwrite(file, offset, data):
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_every_damage_is_found_and_the_commit_before_is_used(tmp_path):
    for step in (1, 2):
        commit(tmp_path, step)
    good, bad = tmp_path / "step-00000001", tmp_path / "step-00000002"
    spare = tmp_path / "spare"
    shutil.copytree(bad, spare)
    tried = 0
    for what, damage in damages(bad):
        damage()
        said = []
        found = newest_commit(tmp_path, report=said.append)
        assert found is not None, what
        assert found.folder == good, what
        assert what.split()[0] in said[0], what
        with pytest.raises(Damaged):
            verify(bad)
        tried += 1
        shutil.rmtree(bad)
        shutil.copytree(spare, bad)
    assert tried == 3 * 70
    assert newest_commit(tmp_path).folder == bad


def test_swapped_files_stale_manifests_and_strangers_are_found(tmp_path):
    def save(folder):
        (folder / "a").write_bytes(b"1234")
        (folder / "b").write_bytes(b"5678")

    def fresh():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for step in (1, 2):
            write_commit(tmp_path / "run", step, save)
        return tmp_path / "run" / "step-00000002"

    folder = fresh()
    os.rename(folder / "a", folder / "c")
    os.rename(folder / "b", folder / "a")
    os.rename(folder / "c", folder / "b")
    with pytest.raises(Damaged, match="a: its sha256"):
        verify(folder)
    folder = fresh()
    shutil.copy(tmp_path / "run" / "step-00000001" / "manifest.json", folder)
    with pytest.raises(Damaged, match="manifest of step 1"):
        verify(folder)
    folder = fresh()
    (folder / "extra").write_text("")
    with pytest.raises(Damaged, match="extra: is not in"):
        verify(folder)
    folder = fresh()
    shutil.copy(folder / "a", tmp_path / "outside")
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(Damaged, match="a: is missing"):
        verify(folder)


def test_without_any_valid_commit_there_is_none(tmp_path):
    commit(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-12").mkdir()
    said = []
    assert newest_commit(tmp_path, report=said.append) is None
    assert len(said) == 2


def test_rank_zero_chooses(tmp_path):
    class Other:
        is_main = False

        def broadcast(self, value):
            return commits.Commit(tmp_path / "step-00000004", 4, {})

    commit(tmp_path, 5)
    assert newest_commit(tmp_path, ranks=Other()).step == 4


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path):
    def work():
        with contextlib.suppress(UserError), locked(tmp_path / "my run é"):
            return 5
        return 6

    with locked(tmp_path / "my run é"):
        assert in_child(work) == 6
        assert os.listdir(tmp_path / "my run é") == ["lock"]
    assert in_child(work) == 5

    def die():
        with locked(tmp_path / "my run é"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert in_child(work) == 5
    owner = f"process {os.getpid()} on"
    with locked(tmp_path / "a"), pytest.raises(UserError, match=owner), locked(tmp_path / "a"):
        pass


def test_a_lock_under_which_nothing_was_made_leaves_nothing_that_was_not_there(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for name in ("a/b/run", "there", "there/run", "full"):
        with contextlib.suppress(KeyError), locked(tmp_path / name):
            raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt", "there"]


def test_a_lock_under_which_something_was_made_stays_with_it(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "a" / "run"):
            (tmp_path / "a" / "run" / "made").mkdir(exist_ok=True)
        assert sorted(os.listdir(tmp_path / "a" / "run")) == ["lock", "made"]
    with locked(tmp_path / "b" / "run"):
        (tmp_path / "b" / "other").mkdir()
    assert os.listdir(tmp_path / "b") == ["other"]


def test_a_lock_that_was_removed_while_another_process_took_it_is_not_held(tmp_path, monkeypatch):
    """The other process opens the lock of one that is refused and removes it before it lets go."""
    flock = commits.fcntl.flock

    def late(lock, how):
        (tmp_path / "run" / "lock").unlink()
        flock(lock, how)

    monkeypatch.setattr(commits.fcntl, "flock", late)
    with pytest.raises(UserError, match="another process works on this run"), locked(tmp_path / "run"):
        pass
