"""A Hub on loopback: repositories, branches, pull requests, storage of large files, downloads; and faults on demand.

What was received, stored and committed is kept for the tests to look at. The protocol is in hub_protocol.py.
"""

import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer

import pytest
from hub_protocol import Fault, Handler, Repository, Request, sha256

__all__ = ["Fault", "LoopbackHub", "hub", "sha256"]


class LoopbackHub:
    """`with LoopbackHub() as hub`: `hub.url`, `hub.token`, `hub.repositories`, `hub.requests`, `hub.stored`."""

    def __init__(self):
        self.token = "hf_LoopbackSecretOfTheTests0123456789"
        self.reader = "hf_LoopbackReaderOfTheTests0123456789"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.ranges: list[str] = []
        self.stored: Counter[str] = Counter()
        self.acknowledged: set[str] = set()
        self.sent_again: list[str] = []
        self.fault = lambda request: None
        self.extra_tree: list[dict] = []
        self.part = None
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"  # another host, as on the Hub
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, files: dict[str, bytes] | None = None, **settings) -> Repository:
        repository = self.repositories[name] = Repository(**settings)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "first")
        return repository

    def paths(self, method: str | None = None) -> list[str]:
        return [f"{r.method} {r.path}" for r in self.requests if method in (None, r.method)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that huggingface_hub takes for the real one; the token is in the environment."""
    import huggingface_hub
    from huggingface_hub import constants

    with LoopbackHub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-login"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "no-logins"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(time, "sleep", lambda seconds: server.waits.append(seconds))
        server.waits = []
        yield server
        huggingface_hub.close_session()
