import shutil
import time

import pytest
from loopback_hub import LoopbackHub
from published import make_source, make_student


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Source and student, not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    source = make_source(folder / "source")
    return source, make_student(folder / "student", source)


@pytest.fixture
def student(made, tmp_path):
    """A student of its own for a test."""
    return shutil.copytree(made[1], tmp_path / "student")


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "source")


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
