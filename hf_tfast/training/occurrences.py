"""How far back what a token says last occurred: beyond a window, only attention that reaches further can copy it.

An occurrence is a run of `unit` equal tokens that ends at the token, within its segment. With learned tokens, which
are mostly words and pieces of words, a unit is one token. A single byte recurs all the time and says nothing, so for
bytes a unit is UNIT_OF_BYTES: the target has occurred when it and the bytes before it have, about a word.

    distance(t) = t - max {p < t : x[p-unit+1 .. p] = x[t-unit+1 .. t], same segment},  0 where there is none

The query that predicts token t of a causal model is token t - 1, and a window of w keys (itself counted) shows it
t - w .. t - 1. So a target is `near` where its distance is at most w, `far` beyond, `new` where it has not occurred.
In a stack of layers information can travel further than one window, w - 1 tokens a layer: far is not out of reach.

Two-way models read both sides and hide tokens from themselves: there the distance is that to the nearest occurrence on
either side none of whose tokens is hidden.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .packing import IGNORED

NEW, NEAR, FAR = CLASSES = ("new", "near", "far")
UNIT_OF_BYTES = 6


def distances(
    ids: Tensor, segments: Tensor, unit: int = 1, *, two_way: bool = False, visible: Tensor | None = None
) -> Tensor:
    """[n i] int64 of every token: how far away it last (two_way: nearest) occurred; 0 where it did not.

    ids, segments  [n i] integers; segments are numbered along a row.
    visible        [n i] bool, two_way only: an occurrence counts if all of its tokens are visible.
    """
    if unit < 1:
        raise ValueError(f"a unit holds at least 1 token, got {unit}")
    n, i = ids.shape
    x, segment = ids.numpy().astype(np.int64), segments.numpy().astype(np.int64)
    whole = np.ones((n, i), dtype=bool)  # does a run of `unit` tokens end here, within the segment?
    seen = np.ones((n, i), dtype=bool) if visible is None else visible.numpy().copy()
    counted, run = seen.copy(), x.copy()
    for back in range(1, unit):
        whole[:, :back] = False
        whole[:, back:] &= segment[:, back:] == segment[:, : i - back]
        counted[:, back:] &= seen[:, : i - back]
        earlier = np.zeros_like(x)
        earlier[:, back:] = x[:, : i - back] + 1
        _, run = np.unique(np.stack([run.ravel(), earlier.ravel()]), axis=1, return_inverse=True)
        run = run.reshape(n, i)
    place = np.arange(n * i).reshape(n, i)
    document = np.cumsum(np.diff(segment, axis=1, prepend=-1).ravel() != 0)  # every row begins one
    order = np.lexsort((place.ravel(), run.ravel(), document))
    group = np.cumsum(np.diff(np.stack([document[order], run.ravel()[order]]), axis=1, prepend=-1).any(0))
    usable = (whole & counted).ravel()[order]
    back_to = _nearest(group, usable, order)
    found = back_to
    if two_way:
        ahead = _nearest(group[::-1], usable[::-1], order[::-1])[::-1]
        found = np.where((back_to == 0) | ((ahead > 0) & (ahead < back_to)), ahead, back_to)
    result = np.zeros(n * i, dtype=np.int64)
    result[order] = found
    return torch.from_numpy(np.where(whole, result.reshape(n, i), 0))


def _nearest(group: np.ndarray, usable: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Distance in `place` to the last usable entry before each one, of its own group; 0 where there is none."""
    index = np.arange(len(group))
    last = np.maximum.accumulate(np.where(usable, index, -1))
    last = np.concatenate([[-1], last[:-1]])
    valid = (last >= 0) & (group[last] == group)
    return np.where(valid, np.abs(place - place[last]), 0)


def classes_of(rows: Dataset[dict[str, Tensor]], far: int, unit: int) -> Tensor:
    """[n i] int8 of every label of a data set of `packing` or `masking`: index into CLASSES, -1 where it is no target.

    far  the window: a distance above it is far.
    """
    if far < 1:
        raise ValueError(f"the distance beyond which a token is far is at least 1, got {far}")
    packed, two_way = rows.packed, rows.two_way  # type: ignore[attr-defined]
    labels = torch.stack([rows[n]["labels"] for n in range(len(packed.ids))])
    visible = labels == IGNORED if two_way else None
    distance = distances(packed.ids, packed.segments, unit, two_way=two_way, visible=visible)
    kind = torch.where(distance == 0, CLASSES.index(NEW), CLASSES.index(NEAR)).where(
        distance <= far, CLASSES.index(FAR)
    )
    return kind.where(labels != IGNORED, -1).to(torch.int8)
