"""The frontier of mixes against every mix there is."""

from itertools import product

import pytest
import torch

from hf_tfast.planner.mix import fastest, frontier


def tables(layers, candidates, seed):
    random = torch.Generator().manual_seed(seed)
    seconds = torch.rand(layers, candidates, generator=random).tolist()
    errors = torch.rand(layers, candidates, generator=random).pow(3).tolist()
    for row, e in zip(seconds, errors, strict=True):
        row[0], e[0] = max(row) + 0.1, 0.0  # dense: the slowest, without error
    return seconds, errors


@pytest.mark.parametrize("seed", range(8))
def test_no_mix_beats_a_vertex_of_the_frontier(seed):
    seconds, errors = tables(3, 5, seed)
    everything = [
        (sum(s[c] for s, c in zip(seconds, picks, strict=True)), sum(e[c] for e, c in zip(errors, picks, strict=True)))
        for picks in product(range(5), repeat=3)
    ]
    found = frontier(seconds, errors)
    for mix in found:
        assert mix.seconds == pytest.approx(sum(s[c] for s, c in zip(seconds, mix.picks, strict=True)))
        assert mix.error == pytest.approx(sum(e[c] for e, c in zip(errors, mix.picks, strict=True)))
        assert not any(s < mix.seconds - 1e-12 and e < mix.error - 1e-12 for s, e in everything)
    assert found[0].seconds == pytest.approx(min(s for s, _ in everything))
    assert found[-1].error == 0
    assert found[-1].picks == (0, 0, 0)
    for one, next_one in zip(found, found[1:], strict=False):
        assert one.seconds <= next_one.seconds
        assert one.error > next_one.error


def test_layers_get_what_suits_them():
    """The second layer bears the fast candidate, the first does not."""
    found = frontier([[1.0, 0.1], [1.0, 0.1]], [[0.0, 5.0], [0.0, 0.01]])
    assert [mix.picks for mix in found] == [(1, 1), (0, 1), (0, 0)]


def test_the_fastest_within_the_budget():
    seconds, errors = tables(6, 6, 1)
    mixes = frontier(seconds, errors)
    for budget in (0.0, 0.05, 0.3, 2.0, 100.0):
        asked = []

        def error(mix, asked=asked):
            asked.append(mix)
            return mix.error

        best = fastest(mixes, error, budget)
        assert best == next(mix for mix in mixes if mix.error <= budget)
        assert len(asked) <= 2 + len(mixes).bit_length()
    assert fastest(mixes, lambda mix: 1.0, 0.5) is None


def test_a_candidate_that_cannot_run_is_never_picked():
    inf = float("inf")
    assert [mix.picks for mix in frontier([[2.0, 1.0, inf]], [[0.0, 1.0, inf]])] == [(1,), (0,)]


@pytest.mark.parametrize(("seconds", "errors"), [([], []), ([[1.0]], [[1.0, 2.0]]), ([[]], [[]]), ([[1.0]], [])])
def test_tables_of_other_shapes_raise(seconds, errors):
    with pytest.raises(ValueError, match=r"\[layers\]\[candidates\]"):
        frontier(seconds, errors)
