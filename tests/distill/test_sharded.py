"""A teacher in parts computes what it computes in one piece, and no rank holds all of it; two processes, gloo, CPU."""

import contextlib
import socket

import pytest
import sharded_laws
import torch

CASES = [(tied, offload) for tied in (True, False) for offload in (False, True)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sharded_laws.work, (2, port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole_teacher(ranks, case):
    for rank in ranks:  # the same operations on the same numbers
        assert rank[case]["apart"] == 0
        assert rank[case]["again"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_half_and_reads_every_tensor_once(ranks, case):
    for rank in ranks:
        assert 0.5 <= rank[case]["share"] < 0.6  # every unit is filled up to 8 numbers a rank
        assert rank[case]["reads"] == rank[case]["tensors"]
        assert rank[case]["alive"] == 0  # nothing that was read before is still whole in memory


@pytest.mark.parametrize("case", CASES)
def test_rank_0_runs_it_alone_while_the_others_serve(ranks, case):
    assert [rank[case]["ran"] for rank in ranks] == [True, False]
    assert all(rank[case]["same"] for rank in ranks)


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_rank_0_is_raised_on_all(ranks, case):
    assert all(rank[case]["failed"] for rank in ranks)


def test_a_cache_is_the_same_written_alone_by_two_and_of_a_teacher_in_parts(ranks):
    for rank in ranks:
        alone, by_two, in_parts = rank["cache"]
        assert len(alone) == 3
        assert alone == by_two == in_parts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_parted_as_it_is_read_trains_as_one_that_was_whole(ranks, precision):
    for rank in ranks:
        found = rank["student"][precision]
        assert found["losses"]
        assert found["masters"]
        assert found["left"] == 0
        assert 0.5 <= found["share"] < 0.51  # parts of odd tensors are filled up
        assert found["alive"] <= 1  # the last one's broadcast may still hold it
