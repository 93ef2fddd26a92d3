"""What a push sends, what it refuses before anything is sent, and that what is pulled back has the same bytes."""

import json
import shutil

import pytest
from huggingface_hub import snapshot_download
from published import files_of, make_student

import cli
from convert.publish.manifest import MANIFEST, damage, seal
from convert.publish.push import push
from convert.publish.verify import Invalid, verify
from deltanet_errors import UserError

NAME = "tester/llama-small"


def sent(hub, name: str = NAME, revision: str = "main") -> dict[str, bytes]:
    files = dict(hub.repositories[name].files(revision))
    files.pop(".gitattributes")
    return files


def writes(hub) -> list[str]:
    """Requests that could change something."""
    return [path for path in hub.paths() if not path.startswith("GET")]


def test_everything_arrives_in_one_private_commit_and_comes_back_byte_for_byte(student, hub, tmp_path):
    assert push(student, NAME) == f"{hub.url}/{NAME}"
    repository = hub.repositories[NAME]
    assert sent(hub) == files_of(student)
    assert repository.private
    assert [message for _, message in repository.log] == ["first", "Add a deltanet student"]
    pulled = snapshot_download(NAME, local_dir=tmp_path / "pulled")
    assert damage(tmp_path / "pulled") == []
    assert {name: data for name, data in files_of(tmp_path / "pulled").items() if not name.startswith(".")} == files_of(
        student
    )
    assert verify(snapshot_download(NAME)).problems == []
    assert pulled == str(tmp_path / "pulled")


def test_large_files_may_go_in_parts(student, hub):
    hub.part = 3000
    push(student, NAME)
    assert sent(hub) == files_of(student)
    assert any(path.endswith("/complete") for path in hub.paths("POST"))


def test_weights_are_in_storage_before_the_one_commit_that_shows_them(student, hub):
    push(student, NAME)
    kinds = [path.split("?")[0] for path in writes(hub)]
    commits = [number for number, path in enumerate(kinds) if "/commit/" in path]
    puts = [number for number, path in enumerate(kinds) if path.startswith("PUT /storage")]
    assert len(commits) == 1
    assert puts
    assert max(puts) < commits[0]


def test_a_second_push_sends_nothing(student, hub, capsys):
    push(student, NAME)
    before = len(writes(hub)), len(hub.repositories[NAME].log)
    assert push(student, NAME) == f"{hub.url}/{NAME}"
    assert (len(writes(hub)), len(hub.repositories[NAME].log)) == before
    assert "no commit is made" in capsys.readouterr().err


def test_only_files_on_the_list_are_sent(student, hub, capsys):
    for name in ("optimizer.pt", "notes.txt", "run.log", "code.py", "tokenizer/x.json", "model.bin"):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text("private")
    (student / ".env").write_text("private")
    seal(student)
    push(student, NAME)
    assert not any(b"private" in data for data in sent(hub).values())
    said = capsys.readouterr().err
    assert "note: optimizer.pt stays here" in said
    assert set(json.loads(sent(hub)[MANIFEST])["files"]) == set(sent(hub)) - {MANIFEST}


def test_a_link_is_never_followed(student, hub, tmp_path):
    (tmp_path / "secret").write_text("private")
    (student / "NOTICE.secret").symlink_to(tmp_path / "secret")
    with pytest.raises(Invalid, match=r"NOTICE\.secret: a link to something outside"):
        push(student, NAME)
    seal(student)
    with pytest.raises(Invalid, match=r"NOTICE\.secret: a link"):
        push(student, NAME)
    (student / "NOTICE.secret").unlink()
    (student / "NOTICE.inside").symlink_to(student / "config.json")
    seal(student)
    with pytest.raises(UserError, match=r"NOTICE\.inside: a link; only plain files are sent"):
        push(student, NAME)
    assert writes(hub) == []


def test_nothing_is_sent_of_a_folder_that_does_not_pass(student, hub):
    shard = sorted(student.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(Invalid, match=rf"1 problem; nothing was sent\n  {shard.name}: its sha256"):
        push(student, NAME)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["small", "a/b/c", "user/..", "user/na me", "user/x.git", "", "https://x/y", "u/" + "x" * 120]
)
def test_what_is_no_repository_is_refused(student, hub, name):
    with pytest.raises(UserError, match="not a repository; write user/name"):
        push(student, name)
    assert hub.requests == []


def test_without_a_token_or_offline_nothing_is_tried(student, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"):
        push(student, NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(student, NAME)
    assert hub.requests == []


def test_a_public_repository_is_written_to_only_when_the_user_says_public(student, hub, capsys):
    hub.create(NAME, private=False)
    with pytest.raises(UserError, match="exists and is public; --public"):
        push(student, NAME)
    assert writes(hub) == []
    push(student, NAME, public=True)
    assert sent(hub) == files_of(student)
    push(student, "tester/llama-open", public=True)
    assert not hub.repositories["tester/llama-open"].private
    hub.create("tester/llama-closed")
    capsys.readouterr()
    push(student, "tester/llama-closed", public=True)
    assert "exists and stays private" in capsys.readouterr().err
    assert hub.repositories["tester/llama-closed"].private


def test_a_branch_is_made_and_main_stays_as_it_was(student, hub):
    hub.create(NAME)
    assert push(student, NAME, revision="v1/a") == f"{hub.url}/{NAME}/tree/v1/a"
    assert sent(hub, revision="v1/a") == files_of(student)
    assert sent(hub) == {}
    push(student, NAME, revision="v1/a")
    assert len(hub.repositories[NAME].log) == 2


def test_a_pull_request_needs_no_right_to_write_and_leaves_main_alone(student, hub, monkeypatch):
    hub.create("other/llama", private=False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    link = push(student, "other/llama", pr=True, message="Please")
    assert link == f"{hub.url}/other/llama/discussions/1"
    assert sent(hub, "other/llama", "refs/pr/1") == files_of(student)
    assert sent(hub, "other/llama") == {}
    assert hub.repositories["other/llama"].log[-1] == ("refs/pr/1", "Please")
    with pytest.raises(UserError, match="no pull request can be opened there"):
        push(student, "other/absent", pr=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"revision": "a" * 40}, "a commit cannot be written to"),
        ({"revision": "x", "pr": True}, "give one of the two"),
        *(
            ({"revision": name}, "not the name of a branch")
            for name in ("", "a b", "a..b", "-x", "a/", "main~1", "a\n")
        ),
    ],
)
def test_revisions_that_cannot_be_written_are_refused(student, hub, options, says):
    with pytest.raises(UserError, match=says):
        push(student, NAME, **options)
    assert hub.requests == []


def test_shards_of_an_older_push_go_in_the_same_commit_and_other_files_stay(student, source, hub, tmp_path):
    push(student, NAME)
    repository = hub.repositories[NAME]
    repository.commit("main", repository.files() | {"notes.md": b"kept"}, "mine")
    push(make_student(tmp_path / "one", source, "5GB"), NAME)
    assert sent(hub) == files_of(tmp_path / "one") | {"notes.md": b"kept"}
    assert len(repository.log) == 4


def test_an_edited_card_is_sent_in_place_of_the_folders_and_the_manifest_follows(student, hub, tmp_path):
    card = tmp_path / "mine.md"
    card.write_text((student / "README.md").read_text() + "\nMore words.\n")
    push(student, NAME, card=card)
    assert sent(hub)["README.md"] == card.read_bytes()
    snapshot_download(NAME, local_dir=tmp_path / "pulled")
    assert damage(tmp_path / "pulled") == []
    for text, says in (("# none", "no YAML head"), ("---\n: [\n---\n", "cannot be read")):
        card.write_text(text)
        with pytest.raises(UserError, match=rf"mine\.md.*{says}"):
            push(student, NAME, card=card)
    with pytest.raises(UserError, match=r"--card .*absent\.md: cannot be read"):
        push(student, NAME, card=tmp_path / "absent.md")


def test_a_file_that_changes_after_it_was_verified_is_noticed(student, hub, monkeypatch):
    from convert.publish import push as module

    look, shard = module._ready, sorted(student.glob("*.safetensors"))[0]

    def change(*arguments):
        look(*arguments)
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(module, "_ready", change)
    with pytest.raises(Exception, match=rf"the Hub does not have {shard.name} as here"):
        push(student, NAME)


def test_a_name_the_licence_does_not_allow_and_a_missing_licence_are_noted(student, source, hub, capsys, tmp_path):
    push(student, "tester/small")
    assert 'Llama 3.2 Community License asks that the name begin with "Llama"' in capsys.readouterr().err
    push(student, NAME)
    assert "note" not in capsys.readouterr().err
    (source / "README.md").unlink()
    push(make_student(tmp_path / "bare", source), "tester/bare")
    assert "note: README.md names no licence" in capsys.readouterr().err


def test_the_command_prints_the_link_alone_on_stdout(student, hub, capsys):
    assert cli.push_main([str(student), NAME]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{NAME}\n"
    assert cli.push_main([str(student / "absent"), NAME]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_dry_run_lists_what_a_push_sends_and_asks_the_hub_nothing(student, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert cli.push_main([str(student), NAME, "--dry-run", "--revision", "v2"]) == 0
    told = capsys.readouterr()
    assert hub.paths() == []
    *files, last = [line.split(None, 2) for line in told.out.splitlines()]
    assert {name: int(size.replace(",", "")) for size, _, name in files} == {
        name: len(data) for name, data in files_of(student).items()
    }
    assert last[2] == f"in {len(files)} files for branch v2 of {NAME}; nothing was sent"
    (student / "config.json").write_text("{}")
    assert cli.push_main([str(student), NAME, "--dry-run"]) == 1
    assert "config.json" in capsys.readouterr().err
    assert cli.push_main([str(student), "no repository", "--dry-run"]) == 2
    assert hub.paths() == []


def test_code_goes_along_only_where_the_config_names_it(student, hub):
    (student / "modeling_x.py").write_text("# flat code for readers without the package\n")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "modeling_x.X"}}))
    seal(student)
    push(student, NAME)
    assert "modeling_x.py" in sent(hub)


def test_a_folder_from_the_cache_of_the_hub_has_links_and_is_refused_by_name(student, hub):
    push(student, NAME)
    with pytest.raises(UserError, match="a link; only plain files are sent"):
        push(snapshot_download(NAME), "tester/llama-copy")
    shutil.rmtree(student)


@pytest.mark.parametrize("is_watched", [True, False])
def test_progress_bars_are_there_for_people_only(student, hub, monkeypatch, is_watched):
    """Whatever loading the model for its verification has done to them before."""
    from huggingface_hub import utils

    monkeypatch.setattr("sys.stderr.isatty", lambda: is_watched, raising=False)
    seen = set()
    hub.fault = lambda request: seen.add(utils.are_progress_bars_disabled()) if request.method == "PUT" else None
    push(student, NAME)
    assert seen == {not is_watched}
