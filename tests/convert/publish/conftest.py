import shutil

import pytest
from loopback_hub import hub
from published import make_source, make_student

__all__ = ["hub"]


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
