import pytest
from tiny import make_teacher


@pytest.fixture
def teacher(tmp_path):
    """The folder of a tiny random Llama."""
    make_teacher(tmp_path / "teacher")
    return tmp_path / "teacher"
