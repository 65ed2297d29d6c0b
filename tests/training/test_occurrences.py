"""Distances to the last and the nearest occurrence, against a loop that looks at every pair."""

import random

import pytest
import torch

from hf_tfast.training.masking import MaskedRows
from hf_tfast.training.occurrences import CLASSES, FAR, NEAR, NEW, classes_of, distances
from hf_tfast.training.packing import IGNORED, PackedRows, pack
from hf_tfast.training.tokens import byte_tokenizer


def brute_force(ids, segments, unit, two_way, visible):
    n, i = ids.shape
    found = torch.zeros(n, i, dtype=torch.int64)

    def run(row, end):
        inside = range(end - unit + 1, end + 1)
        if inside[0] < 0 or any(segments[row, p] != segments[row, end] for p in inside):
            return None
        return tuple(ids[row, p].item() for p in inside)

    for row in range(n):
        for t in range(i):
            if (mine := run(row, t)) is None:
                continue
            for p in range(i if two_way else t):
                if p == t or segments[row, p] != segments[row, t] or run(row, p) != mine:
                    continue
                if visible is not None and not visible[row, p - unit + 1 : p + 1].all():
                    continue
                away = abs(t - p)
                found[row, t] = away if found[row, t] == 0 else min(found[row, t], away)
    return found


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("unit", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_distances_equal_brute_force(seed, unit, two_way):
    draw = random.Random(f"{seed}{unit}{two_way}")
    found = [[draw.randrange(1, 5) for _ in range(draw.randrange(0, 45))] for _ in range(7)] + [[1, 2]]
    packed = pack(found, draw.randrange(12, 40), 0)
    torch.manual_seed(draw.randrange(999))
    visible = torch.rand(packed.ids.shape) < 0.8 if two_way else None
    got = distances(packed.ids, packed.segments, unit, two_way=two_way, visible=visible)
    assert torch.equal(got, brute_force(packed.ids, packed.segments, unit, two_way, visible))
    assert got.any()


@pytest.mark.parametrize("seed", range(4))
def test_classes_of_a_causal_model(seed):
    draw = random.Random(seed)
    packed = pack([[draw.randrange(1, 9) for _ in range(draw.randrange(1, 60))] for _ in range(5)], 40, 0)
    far = draw.randrange(1, 8)
    kinds, distance = classes_of(PackedRows(packed), far, 1), distances(packed.ids, packed.segments)
    labels = torch.stack([PackedRows(packed)[n]["labels"] for n in range(len(packed.ids))])
    for kind, d, label in zip(kinds.flatten(), distance.flatten(), labels.flatten(), strict=True):
        if label == IGNORED:
            assert kind == -1
        else:
            assert CLASSES[kind] == (NEW if d == 0 else NEAR if d <= far else FAR)


def test_a_window_shows_what_is_near():
    """The query before a target reads `window` keys; near is what is among them, by the mechanism's own predicate."""
    from hf_tfast import Window

    window, i = 5, 30
    none, place = torch.zeros(()), torch.arange(i)
    allowed = Window(window=window).allowed(None, none, none, place[:, None], place, causal=True)
    for t in range(1, i):
        for p in range(t):
            ids = torch.arange(1, i + 1)[None].clone()
            ids[0, t] = ids[0, p]
            kind = classes_of(PackedRows(pack([ids[0].tolist()], i, 0)), window, 1)[0, t]
            assert CLASSES[kind] == (NEAR if allowed[t - 1, p] else FAR)


def test_hidden_tokens_are_no_occurrences():
    tokenizer = byte_tokenizer(64)
    packed = pack([[1, *[9] * 60, 2]], 62, 0)
    rows = MaskedRows(packed, tokenizer, 0.3)
    kinds = classes_of(rows, 1, 1)
    hidden = rows[0]["labels"] != IGNORED
    for t in hidden.nonzero().flatten().tolist():
        beside = [p for p in (t - 1, t + 1) if packed.ids[0, p] == 9 and not hidden[p]]
        assert CLASSES[kinds[0, t]] == (NEAR if beside else FAR)
    assert (kinds[0][~hidden] == -1).all()


@pytest.mark.parametrize(("unit", "far", "words"), [(0, 4, "unit holds at least 1"), (1, 0, "at least 1, got 0")])
def test_bad_numbers(unit, far, words):
    with pytest.raises(ValueError, match=words):
        classes_of(PackedRows(pack([[1, 2, 3]], 3, 0)), far, unit)
