"""Rows where they lie in memory, sums of rows, and scratch that is lent to one pass at a time."""

import pytest
import torch

from hf_tfast.backends.flat import Flat, Sums, by_position
from hf_tfast.backends.scratch import KEPT, borrowed

B, H, N, D = 2, 3, 5, 4


def layouts():
    x = torch.randn(B, H, N, D)
    fused = torch.randn(B, N, 3 * H * D)[..., H * D : 2 * H * D].unflatten(-1, (H, D)).transpose(1, 2)
    return {
        "by head": x,
        "by position": torch.randn(B, N, H, D).transpose(1, 2),
        "part of a fused projection": fused,
        "expanded": torch.randn(B, 1, N, D).expand(B, H, N, D),
        "rows in pieces": torch.randn(B, H, D, N).mT,
        "every other feature": torch.randn(B, H, N, 2 * D)[..., ::2],
        "rows that do not divide": torch.randn(B, H, N, D + 1)[..., :D],
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("spare", [False, True])
def test_rows_are_those_of_the_tensor(name, spare):
    x = layouts()[name]
    flat, index = Flat.of(x, spare), torch.randperm(B * H * N)
    assert torch.equal(flat.rows[flat.at(index)], x.reshape(-1, D)[index])
    if spare:
        assert flat.rows[flat.at(torch.tensor([B * H * N]))].shape == (1, D)


@pytest.mark.parametrize("position", [False, True])
def test_sums_hold_what_was_added_and_nobody_takes_nothing(position):
    sums = Sums.zeros((B, H, N, D), torch.float32, torch.device("cpu"), position)
    index, given = torch.randint(B * H * N + 1, (40,)), torch.randn(40, D)
    sums.flat.rows.index_add_(0, sums.flat.at(index), given)
    expected = torch.zeros(B * H * N + 1, D).index_add_(0, index, given)[:-1].view(B, H, N, D)
    torch.testing.assert_close(sums.view(), expected)
    assert by_position(sums.view()) is position


def test_scratch_is_lent_to_one_pass_at_a_time():
    like = torch.zeros(1)
    with borrowed(like) as one:
        first = one("x", (3, 2), torch.float32)
        with borrowed(like) as two:
            assert two is not one
            assert two("x", (3, 2), torch.float32).data_ptr() != first.data_ptr()
        one("large", (KEPT,), torch.float32)
    with borrowed(like) as later, torch.inference_mode():
        assert not any(x.nbytes > KEPT for x in later.held.values())
        later("made under inference mode", (2,), torch.float32).fill_(1)
    with borrowed(like) as later:
        later("made under inference mode", (2,), torch.float32).fill_(2)
