"""The fastest mixes of mechanisms over layers, from times and errors that were measured. Pure numbers, no model.

The error of a whole model is taken as a sum over its layers, sum_l weight_l * error_l^2: both measures of the end, KL
divergence and one minus a cosine, vanish to second order where nothing was changed. The sum only orders the mixes;
what a mix really costs is measured by the caller.

A mix that no other beats in time and predicted error lies, up to gaps between vertices, on the lower hull that every
layer's own trade-off makes: with a price on error each layer decides alone (Lagrange multipliers, Everett 1963).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Mix", "fastest", "frontier"]


@dataclass(frozen=True)
class Mix:
    """What every layer runs, as places in the list of candidates; `seconds` and `error` are sums of the layers'."""

    picks: tuple[int, ...]
    seconds: float
    error: float


def frontier(seconds: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> list[Mix]:
    """Mixes from the fastest to the most faithful, each slower and more faithful than the one before.

    seconds, errors   [layers][candidates]: the time of a layer with each candidate, and what it adds to the error.
    Raises            ValueError for tables of other shapes, or without a layer or a candidate.
    """
    shapes = {len(row) for row in (*seconds, *errors)}
    if len(seconds) != len(errors) or len(shapes) != 1 or not seconds or shapes == {0}:
        raise ValueError("seconds and errors must be [layers][candidates] of one shape, with one of each at least")
    picks = [_quickest(*row) for row in zip(seconds, errors, strict=True)]
    found = [_mix(picks, seconds, errors)]
    ordered = sorted(
        (price, layer, place, candidate)
        for layer, row in enumerate(zip(seconds, errors, strict=True))
        for place, (price, candidate) in enumerate(_hull(*row))
    )
    for _, layer, _, candidate in ordered:
        picks[layer] = candidate
        found.append(_mix(picks, seconds, errors))
    return found


def _mix(picks: Sequence[int], seconds: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> Mix:
    taken = tuple(picks)
    return Mix(
        taken,
        sum(row[c] for row, c in zip(seconds, taken, strict=True)),
        sum(row[c] for row, c in zip(errors, taken, strict=True)),
    )


def _quickest(seconds: Sequence[float], errors: Sequence[float]) -> int:
    return min(range(len(seconds)), key=lambda c: (seconds[c], errors[c]))


def _hull(seconds: Sequence[float], errors: Sequence[float]) -> list[tuple[float, int]]:
    """(price, candidate) of every step from the fastest candidate to the most faithful one along the lower convex hull
    of (error, seconds): seconds that a unit less of error costs, ever more."""
    here = _quickest(seconds, errors)
    steps: list[tuple[float, int]] = []
    while True:
        better = [c for c in range(len(seconds)) if errors[c] < errors[here]]
        if not better:
            return steps
        price = {c: (seconds[c] - seconds[here]) / (errors[here] - errors[c]) for c in better}
        here = min(better, key=lambda c: (price[c], errors[c]))
        steps.append((price[here], here))


def fastest(mixes: Sequence[Mix], error: Callable[[Mix], float], budget: float) -> Mix | None:
    """The first of `mixes`, ordered as by `frontier`, whose measured error is within the budget; None where none is.

    By bisection, since the measured error falls along the frontier but for noise: at most 2 + log2(len(mixes)) calls.
    """
    if error(mixes[-1]) > budget:
        return None
    low, high = 0, len(mixes) - 1  # mixes[high] is within the budget
    while low < high:
        middle = (low + high) // 2
        if error(mixes[middle]) <= budget:
            high = middle
        else:
            low = middle + 1
    return mixes[high]
