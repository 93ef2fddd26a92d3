"""A push through a Hub that fails: at every single request, once; and at each kind of request, for good."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import Fault, LoopbackHub
from published import files_of

import cli
from convert.publish import push as module
from convert.publish.push import push
from convert.publish.verify import Verified
from deltanet_errors import DeltanetError, UserError

NAME = "tester/llama-small"
ONCE = {
    "503": Fault(503),
    "429": Fault(429, {"Retry-After": "7"}),
    "broken before": Fault(broken="before"),
    "broken during": Fault(broken="during"),
    "broken after": Fault(broken="after"),
    "silent": Fault(silent=True),
}


def lose_patience(monkeypatch) -> None:
    """Half a second of silence counts as a lost request. On a busy machine that may also be a late answer, after which
    a file is rightly sent again; so only tests of silence do it, and they do not count what is sent again."""
    monkeypatch.setattr(module, "SILENCE", 0.5)


def arrived(hub, student) -> bool:
    files = dict(hub.repositories[NAME].files())
    files.pop(".gitattributes")
    return files == files_of(student)


def is_counted(path: str) -> bool:
    return not path.startswith("/api/agent")  # the Hub's library asks this when it likes, and does not need it


@pytest.mark.parametrize("kind", ONCE)
def test_a_fault_at_any_one_request_loses_nothing_and_commits_once(student, hub, kind, monkeypatch):
    """Request after request fails in turn, each on a repository of its own, until one push has none left to fail."""
    monkeypatch.setattr(module, "verify", lambda folder: Verified(folder))  # its own tests are elsewhere
    if kind == "silent":
        lose_patience(monkeypatch)
    for victim in range(100):
        hub.repositories.clear(), hub.blobs.clear(), hub.acknowledged.clear(), hub.sent_again.clear()
        seen, failed = [], []

        def fault(request, seen=seen, failed=failed, victim=victim):
            if not is_counted(request.path):
                return None
            seen.append(request.path)
            if len(seen) == victim + 1:
                failed.append(request.path)
                return ONCE[kind]
            return None

        hub.fault = fault
        push(student, NAME)
        assert arrived(hub, student), (kind, failed)
        assert [message for _, message in hub.repositories[NAME].log] == ["first", "Add a deltanet student"], failed
        assert kind == "silent" or not hub.sent_again, failed
        if not failed:
            break
    assert 12 <= victim < 40
    if kind == "429":
        assert max(hub.waits) >= 7


STAGES = {
    "looking": r"^/api/models/tester/llama-small$",
    "creating": r"^/api/repos/create$",
    "asking": r"/preupload/",
    "storage list": r"objects/batch$",
    "storage": r"^/storage/\w+$",
    "committing": r"/commit/main$",
    "checking": r"/tree/",
}
FOR_GOOD = {
    "401": (Fault(401), 2, r"the Hub does not accept the token \(401\); log in with `hf auth login`, or set HF_TOKEN"),
    "403": (Fault(403), 2, r"the token may not do this \(403\); it needs the permission to write"),
    "404": (
        Fault(404, {"X-Error-Code": "RepoNotFound"}),
        2,
        r"the Hub has no such repository, .* \(404\)",
    ),
    "409": (Fault(409), 1, r"it was changed by someone else at the same time \(409\)"),
    "412": (Fault(412), 1, r"it was changed by someone else at the same time \(412\)"),
    "429": (
        Fault(429, {"Retry-After": "5"}),
        1,
        r"the Hub asks for fewer requests \(429\), and to wait 5 s; run",
    ),
    "500": (Fault(500), 1, r"the Hub failed \(500\); run the same command again"),
    "503": (Fault(503, body="<html>busy</html>"), 1, r"the Hub failed \(503\); run the same command again"),
    "broken": (Fault(broken="before"), 1, r"the connection to the Hub broke \(\w+: .+\); run the same command again"),
    "silent": (Fault(silent=True), 1, r"the Hub did not answer in time; run the same command again"),
}
# What ends otherwise: an absent repository is made, one that is there is used, and the list is asked twice.
EXCEPT = {("looking", "404"), ("creating", "409")}


@pytest.mark.parametrize("what", FOR_GOOD)
def test_a_fault_for_good_is_one_clear_line_and_the_next_run_ends_well(student, hub, what, capsys, monkeypatch):
    monkeypatch.setattr(module, "verify", lambda folder: Verified(folder))
    fault, code, says = FOR_GOOD[what]
    if what == "silent":
        lose_patience(monkeypatch)
    stages = ("looking", "committing") if what == "silent" else STAGES  # each costs the time of all its tries
    for stage in stages:
        if (stage, what) in EXCEPT:
            continue
        hub.repositories.clear(), hub.blobs.clear(), hub.acknowledged.clear(), hub.sent_again.clear()
        hub.fault = lambda request, stage=stage: fault if re.search(STAGES[stage], request.path) else None
        assert cli.push_main([str(student), NAME]) == code, stage
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(f"^deltanet-push: {NAME}: {says}", line), (stage, line)
        if NAME in hub.repositories:
            shown = hub.repositories[NAME].files()
            assert set(shown) == {".gitattributes"} or arrived(hub, student)
        hub.fault = lambda request: None
        assert cli.push_main([str(student), NAME]) == 0, stage
        assert arrived(hub, student)
        assert len(hub.repositories[NAME].log) == 2
        assert what == "silent" or not hub.sent_again
        capsys.readouterr()


def test_a_reader_of_main_never_sees_a_part_of_the_model(student, hub):
    """What main shows at each request of a push is nothing or everything."""
    states = set()

    def look(request):
        if NAME in hub.repositories:
            states.add(frozenset(hub.repositories[NAME].files()))

    hub.fault = look
    push(student, NAME)
    assert states == {frozenset({".gitattributes"}), frozenset({".gitattributes", *files_of(student)})}


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(student, hub):
    hub.create(NAME)

    def intrude(request):
        if "/commit/" in request.path and len(hub.repositories[NAME].log) == 1:
            hub.repositories[NAME].commit("main", {"theirs": b"x"}, "theirs")

    hub.fault = intrude
    with pytest.raises(DeltanetError, match=r"changed by someone else at the same time \(412\)"):
        push(student, NAME)
    assert hub.repositories[NAME].files() == {"theirs": b"x"}


def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(student, hub):
    hub.create(NAME)
    hub.fault = lambda request: Fault(broken="after") if "/commit/" in request.path else None
    with pytest.raises(DeltanetError, match="the connection to the Hub broke"):
        push(student, NAME, pr=True)
    assert [branch for branch, _ in hub.repositories[NAME].log] == ["main", "refs/pr/1"]


def test_files_that_the_repository_ignores_are_missed(student, hub):
    """A .gitignore on the Hub drops files without a word; the comparison afterwards finds them."""
    hub.create(NAME)
    real = module._tree

    def without(api, repository, commit):
        tree = real(api, repository, commit)
        tree.pop("tokenizer.json", None)
        return tree

    module._tree = without
    try:
        with pytest.raises(DeltanetError, match=r"the Hub does not have tokenizer\.json as here"):
            push(student, NAME)
    finally:
        module._tree = real


def test_an_invalid_card_by_the_hubs_rules_is_refused_with_its_words(student, hub):
    body = json.dumps({"errors": [{"message": '"license" must be one of [apache-2.0]'}], "warnings": []})
    hub.fault = lambda request: Fault(400, body=body) if "validate-yaml" in request.path else None
    with pytest.raises(DeltanetError, match="must be one of"):
        push(student, NAME)
    assert set(hub.repositories[NAME].files()) == {".gitattributes"}


def test_a_token_that_may_only_read_is_told_so(student, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    with pytest.raises(UserError, match=r"the token may not do this \(403\)"):
        push(student, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong0123456789")
    with pytest.raises(UserError, match=r"does not accept the token \(401\)"):
        push(student, NAME)


def test_the_token_is_in_no_log_output_or_file(student, hub, tmp_path, capfd, caplog, monkeypatch):
    """Under the loudest logging there is, through success and each kind of failure, with the traceback shown."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    hub_logging.set_verbosity_debug()
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        for fault in (Fault(401), Fault(500), Fault(broken="before"), None):
            hub.fault = lambda request, fault=fault: fault if "/commit/" in request.path else None
            if fault is None:
                assert cli.push_main([str(student), NAME]) == 0
            else:
                assert cli.push_main([str(student), NAME]) > 0
                with pytest.raises(DeltanetError):
                    cli.push_main([str(student), NAME, "--debug"])
    finally:
        hub_logging.set_verbosity_warning()
        logging.getLogger().setLevel(logging.WARNING)
    out = capfd.readouterr()
    texts = [out.out, out.err, caplog.text, json.dumps([str(record.__dict__) for record in caplog.records])]
    texts += [data.decode("latin-1") for data in files_of(tmp_path).values()]
    texts += [data.decode("latin-1") for data in hub.repositories[NAME].files().values()]
    assert len(out.err) > 1000
    assert "authorization" in out.err.lower() or "authenticated" in caplog.text
    assert not [text for text in texts if hub.token in text]


@pytest.mark.slow
def test_a_killed_push_goes_on_and_sends_no_large_file_again(student, tmp_path):
    """The real command in a process of its own, killed when its commit is about to be made; then run again."""
    with LoopbackHub() as hub:
        environment = {
            **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        command = [sys.executable, "-c", "import sys, cli; sys.exit(cli.push_main(sys.argv[1:]))", str(student), NAME]
        root = Path(cli.__file__).parent
        first = subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE)

        def kill(request):
            if "/commit/" in request.path and first.poll() is None:
                first.kill()
                first.wait()
                return Fault(broken="before")
            return None

        hub.fault = kill
        first.communicate(timeout=120)
        assert first.returncode == -9
        stored = dict(hub.stored)
        assert stored
        assert set(hub.repositories[NAME].files()) == {".gitattributes"}
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{hub.url}/{NAME}\n"
        assert arrived(hub, student)
        assert dict(hub.stored) == stored
        assert hub.token not in done.stdout + done.stderr
        saved = list(files_of(tmp_path / "home").values()) if (tmp_path / "home").exists() else []
        assert not any(hub.token.encode() in data for data in saved)
