"""`deltanet-push FOLDER user/name`: a verified folder becomes one commit on the Hub.

Order: the folder is verified, the repository looked at or made, large files sent to storage, and then one commit makes
everything visible, so no reader ever sees half a model. Interrupted anywhere, the same command goes on: what storage
has is not sent again, and a commit that arrived is recognised. Afterwards the Hub's list of files is compared with
ours. Requests are made by huggingface_hub; the token comes from its login or HF_TOKEN and goes nowhere else.
Twins: tests/convert/publish/test_push.py, test_push_faults.py.
"""

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltanet_errors import DeltanetError, UserError

from ..checkpoint import INDEX, SINGLE
from ..sources import HUB_ID
from .files import README, REPORTS, SHARDS, is_published, matches
from .hub_errors import patiently
from .licences import card_head, from_head
from .manifest import MANIFEST, as_manifest, read_manifest
from .verify import check_card, verify

BRANCH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
SILENCE = 120.0
"""Seconds without a byte from the Hub before a request counts as lost; its library waits for ever."""
# What an older push of a student may have left and a newer one no longer has.
OURS = (SINGLE, SHARDS, INDEX, *REPORTS)


@dataclass(frozen=True)
class Item:
    """A file to be sent: where its bytes are, and what they must be when they arrive."""

    data: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Item":
        return cls(data, len(data), hashlib.sha256(data).hexdigest())

    def is_there(self, entry) -> bool:
        """Whether the Hub's entry of a file has these bytes: by sha256 in storage, by git's digest of small files."""
        if entry is None or entry.size != self.size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.sha256
        body = self.data if isinstance(self.data, bytes) else self.data.read_bytes()
        same = hashlib.sha256(body).hexdigest() == self.sha256
        return same and entry.blob_id == hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def push(
    folder: str | Path,
    repository: str,
    *,
    public: bool = False,
    revision: str | None = None,
    pr: bool = False,
    message: str | None = None,
    card: str | Path | None = None,
) -> str:
    """Sends the folder to the Hub repository `repository` (user/name) and returns the link to what was made.

    A new repository is private unless `public`. `revision` is a branch, made where it is missing; `pr` opens a pull
    request instead; `card` is a file to send as README.md. Raises Invalid or UserError before anything is sent where
    the folder does not pass, UserError where the Hub refuses, DeltanetError where it failed.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    _check_target(repository, revision, pr)
    token = require_token(repository)
    content = _content(folder, card, repository)
    _limit_silence()
    api = HfApi(token=token, library_name="deltanet")
    url = f"{api.endpoint}/{repository}"
    _ready(api, repository, public, revision, pr)
    with _bars():
        commit, link = patiently(
            lambda: _commit(api, repository, content, revision, pr, message or "Add a deltanet student"),
            repository,
            can_repeat=not pr,
        )
    there = patiently(lambda: _tree(api, repository, commit), repository)
    missing = [name for name, item in content.items() if not item.is_there(there.get(name))]
    if missing:
        raise DeltanetError(f"{url}: after the commit {commit} the Hub does not have {', '.join(missing[:5])} as here")
    return link or (f"{url}/tree/{revision}" if revision else url)


def plan(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    pr: bool = False,
    card: str | Path | None = None,
) -> dict[str, int]:
    """The files that `push` would send of a folder that passes, and their bytes. Asks the Hub nothing, and needs no
    token. Raises as `push` does before anything is sent."""
    _check_target(repository, revision, pr)
    return {name: item.size for name, item in _content(Path(folder), card, repository).items()}


def run(arguments) -> None:
    """The command line: pushes and prints the link, or with --dry-run prints what would be sent."""
    options = {key: value for key, value in vars(arguments).items() if key not in ("debug", "dry_run")}
    if not arguments.dry_run:
        print(push(**options))
        return
    sizes = plan(**{key: value for key, value in options.items() if key not in ("public", "message")})
    for name, size in sorted(sizes.items()):
        print(f"{size:>15,} B  {name}")
    where = "a pull request to " if arguments.pr else f"branch {arguments.revision} of " if arguments.revision else ""
    print(f"{sum(sizes.values()):>15,} B  in {len(sizes)} files for {where}{arguments.repository}; nothing was sent")


def check_repository(name: str) -> None:
    """Raises UserError unless `name` is user/name as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        sound = HUB_ID.fullmatch(name) is not None
    except HFValidationError:
        sound = False
    if not sound:
        raise UserError(f"{name}: not a repository; write user/name, of letters, digits, '-', '_' and '.'")


def require_token(repository: str) -> str:
    """The token of the login or HF_TOKEN. Raises UserError without one, or where the Hub must not be reached."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    token = get_token()
    if token is None:
        raise UserError(f"{repository}: no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    return token


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_target(repository: str, revision: str | None, pr: bool) -> None:
    check_repository(repository)
    if revision is not None and pr:
        raise UserError(f"--revision {revision}: a pull request (--pr) is made against main; give one of the two")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"--revision {revision}: a commit cannot be written to; give the name of a branch")
    if revision is not None and (not BRANCH.fullmatch(revision) or ".." in revision or revision.endswith(".lock")):
        raise UserError(f"--revision {revision!r}: not the name of a branch; letters, digits, '-', '_', '.' and '/'")


def _content(folder: Path, card: str | Path | None, repository: str) -> dict[str, Item]:
    """What is sent, by name: verified, on the list of `files.py`, and no link. What the licence asks of the name is
    told."""
    verify(folder).refuse("; nothing was sent")
    listed, content = read_manifest(folder), {}
    for name, (size, digest) in listed.items():
        if any((folder / part).is_symlink() for part in (name, *Path(name).parents[:-1])):
            raise UserError(f"{folder / name}: a link; only plain files are sent, so put a copy in its place")
        if is_published(name, folder):
            content[name] = Item(folder / name, size, digest)
        else:
            say(f"note: {name} stays here; it is not one of the files that are published")
    if card is not None:
        content[README] = Item.of(_read_card(Path(card)))
    _mind_the_name(folder, repository)
    sent = {name: (item.size, item.sha256) for name, item in content.items()}
    text = (folder / MANIFEST).read_bytes() if sent == listed else as_manifest(sent).encode("utf-8")
    return content | {MANIFEST: Item.of(text)}


def _read_card(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        check_card(data.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--card {path}: cannot be read: {error}") from None
    return data


def _mind_the_name(folder: Path, repository: str) -> None:
    head = card_head(folder)
    if not isinstance(head.get("license"), str):
        say(f"note: {README} names no licence; a student inherits its source's")
        return
    licence = from_head(head)
    if licence.prefix and not repository.split("/")[1].lower().startswith(licence.prefix.split()[0].lower()):
        say(f'note: the {licence.title} asks that the name begin with "{licence.prefix}", and {repository} does not')


def _ready(api, repository: str, public: bool, revision: str | None, pr: bool) -> None:
    """The repository exists, as private or public as the user said, with the branch."""
    from huggingface_hub.errors import HfHubHTTPError

    def look():
        try:
            return api.repo_info(repository)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return None

    info = patiently(look, repository)
    if info is None and pr:
        raise UserError(f"{repository}: the Hub has no such repository (404), so no pull request can be opened there")
    if info is None:
        patiently(lambda: api.create_repo(repository, private=not public, exist_ok=True), repository)
    elif not info.private and not public and not pr:
        raise UserError(f"{repository}: exists and is public; --public says that everybody may read what is sent")
    elif info.private and public:
        say(f"note: {repository} exists and stays private; its settings page makes it public")
    if revision is not None and not revision.startswith("refs/"):
        patiently(lambda: api.create_branch(repository, branch=revision, exist_ok=True), repository)


def _commit(
    api, repository: str, content: dict[str, Item], revision: str | None, pr: bool, message: str
) -> tuple[str, str | None]:
    """(commit, link of the pull request). Looks at the branch anew, so that a try that arrived after all is seen."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repository, revision=revision).sha
    remote = _tree(api, repository, head)
    stale = [name for name in remote if name not in content and any(matches(name, pattern) for pattern in OURS)]
    if not stale and all(item.is_there(remote.get(name)) for name, item in content.items()):
        say("everything is there already; no commit is made")
        return head, None
    say(f"sends {sum(item.size for item in content.values()) / 1e6:,.1f} MB in {len(content)} files to {repository}")
    add = [CommitOperationAdd(name, item.data) for name, item in content.items()]
    made = api.create_commit(
        repository,
        [*add, *map(CommitOperationDelete, stale)],
        commit_message=message,
        revision=revision,
        create_pr=pr,
        parent_commit=head,
    )
    return made.oid, made.pr_url


def _tree(api, repository: str, commit: str) -> dict:
    """name -> the Hub's entry of every file."""
    return {
        entry.path: entry
        for entry in api.list_repo_tree(repository, recursive=True, revision=commit)
        if hasattr(entry, "blob_id")
    }


def _limit_silence() -> None:
    """Gives the Hub library's HTTP client a limit on silence, also where a call of it asks for none."""
    from huggingface_hub import get_session, set_client_factory

    def limit(request) -> None:
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {key: asked.get(key) or SILENCE for key in ("connect", "read", "write", "pool")}

    session = get_session()
    kind, hooks = type(session), session.event_hooks
    hooks = hooks | {"request": [hook for hook in hooks["request"] if hook.__name__ != limit.__name__] + [limit]}
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=SILENCE))


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The Hub library's progress bars, where a person watches and has not switched them off; otherwise none."""
    from huggingface_hub import constants, utils

    before = utils.are_progress_bars_disabled()
    wanted = sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is not True
    (utils.enable_progress_bars if wanted else utils.disable_progress_bars)()
    try:
        yield
    finally:
        (utils.disable_progress_bars if before else utils.enable_progress_bars)()
