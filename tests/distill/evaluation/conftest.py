"""One pair of models for all these tests; none of them changes it."""

import pytest
from eval_subjects import write_pair

from distill.evaluation.subject import load_subject


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def teacher(folders):
    return load_subject(folders[0], device="cpu")


@pytest.fixture(scope="session")
def student(folders):
    return load_subject(folders[1], device="cpu")
