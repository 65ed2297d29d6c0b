"""What every mechanism is measured with: the one place that holds budgets, for speed and for fidelity.

A mechanism without an entry in both tables fails a test, so that no page leaves one out without a word.
"""

from collections.abc import Callable
from math import log2, sqrt
from typing import Any

from ..attention import Mechanism, mechanisms

Fields = dict[str, Any]

# Fidelity: fields of a run without --mechanism, small budgets first.
FIDELITY: dict[str, list[Fields]] = {
    "dense": [{}],
    "graph": [{}],  # a graph belongs to one length: its fields are those of `_graph`
    "hashed": [{"bits": b, "rounds": n, "cap": 64, "window": 16} for b in (4, 6) for n in (1, 2, 4, 8, 16)],
    "linformer": [{"rank": n} for n in (64, 256, 1024)],
    "nystrom": [{"landmarks": n} for n in (16, 64, 256)],
    "performer": [{"features": n} for n in (64, 256, 1024)],
    "quantized": [
        {"bits": 8}, {"bits": 8, "queries": True}, {"bits": 8, "scheme": "dynamic"}, {"bits": 8, "scheme": "sine"},
        {"bits": 4}, {"bits": 4, "scheme": "dynamic"}, {"bits": 4, "scheme": "log"}, {"bits": 4, "scheme": "sine"},
    ],
    "random": [{"window": 64, "sinks": 1, "blocks": n} for n in (1, 3, 8)],
    "scatterbrain": [{"window": w, "features": n} for w in (16, 128) for n in (64, 256)],
    "svd": [{"rank": n} for n in (2, 4, 8, 16)] + [{"rank": 8, "keys": n} for n in (32, 128, 512)],
    "threshold": [{"tau": t} for t in (1e-2, 1e-3, 1e-4)],
    "topk": [{"k": n, "block": b, "window": 32} for b in (1, 16) for n in (32, 128, 512)],
    "window": [{"window": n, "sinks": 1} for n in (16, 64, 256, 1024)],
}  # fmt: skip

# The field that is turned for more or fewer pairs: what one line of a plot goes along.
TURNED = {"hashed": "rounds", "random": "blocks", "svd": "keys", "threshold": "tau", "topk": "k", "window": "window"}


def _graph(length: int, causal: bool) -> Fields:
    """Own and neighbouring blocks of 64, and the first one: at most 256 keys."""
    last = -(-length // 64) - 1
    rows = [sorted({0, max(a - 1, 0), a, min(a + 1, last)}) for a in range(last + 1)]
    return {"blocks": tuple(tuple(row) for row in rows), "block": 64}


def _topk(length: int, causal: bool) -> Fields:
    """A tenth of the allowed pairs, the query's own block included, or the one block more that fills a short row."""
    if causal:  # n keys of each query are 2 n / L - (n / L)^2 of the triangle; half of the own block lies behind it
        return {"k": 64 * max(1, round(length * (1 - sqrt(0.9)) / 64 - 0.5)), "block": 64, "window": 0}
    return {"k": 64 * max(1, -(-length // 640) - 1), "block": 64, "window": 0}


def _hashed(length: int, causal: bool) -> Fields:
    """Buckets of about 64 keys."""
    return {"bits": max(1, round(log2(max(length, 128) / 64))), "rounds": 2, "cap": 64, "window": 32}


def _always(**fields: Any) -> Callable[[int, bool], Fields]:
    return lambda length, causal: fields


# Speed: fields at a length, causal or not. About 256 keys of a query where a mechanism reads a fixed number of them.
SPEED: dict[str, Callable[[int, bool], Fields]] = {
    "dense": _always(),
    "graph": _graph,
    "hashed": _hashed,
    "linformer": _always(rank=256),
    "nystrom": _always(landmarks=64),
    "performer": _always(features=256),
    "quantized": _always(bits=8),
    "random": _always(window=64, sinks=1, blocks=1, block=64),
    "scatterbrain": _always(window=64, features=128),
    "svd": _always(rank=8, keys=256),
    "threshold": _always(tau=1e-3),
    "topk": _topk,
    "window": lambda length, causal: {"window": 256 if causal else 128},
}


def speed_budget(name: str, length: int, causal: bool) -> Mechanism | None:
    """The mechanism `name` as the speed suite measures it; None under `causal` where it has no causal form."""
    cls = mechanisms()[name]
    if name not in SPEED:
        raise ValueError(
            f"{name} has no entry in SPEED of hf_tfast/benchmarking/budgets.py: say what to measure it with"
        )
    return None if causal and not cls.causal else cls(**SPEED[name](length, causal))


def fidelity_budgets(name: str, length: int) -> list[Fields]:
    """Fields that a mechanism is measured with over documents of `length` tokens, small budgets first."""
    if name not in mechanisms():
        return [{}]  # whoever makes the mechanism says what names there are
    if name not in FIDELITY:
        raise ValueError(f"{name} has no entry in FIDELITY of hf_tfast/benchmarking/budgets.py")
    return [_graph(length, False)] if name == "graph" else FIDELITY[name]


def standard(length: int) -> list[Mechanism]:
    """Every mechanism that exists over its budgets of fidelity; dense is what they are held against."""
    return [cls(**given) for name, cls in mechanisms().items() if name != "dense"
            for given in fidelity_budgets(name, length)]  # fmt: skip
