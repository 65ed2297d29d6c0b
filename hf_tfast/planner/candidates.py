"""What the planner may put into a layer: every mechanism over a few budgets, cut to the length.

A mechanism has an entry in BUDGETS or in LEFT_OUT; a test holds both to the mechanisms that exist.
"""

from collections.abc import Callable, Sequence
from math import log2
from typing import Any

from ..attention import Mechanism, mechanisms

__all__ = ["candidates"]

Fields = dict[str, Any]


def _hashed(length: int, causal: bool) -> list[Fields]:
    bits = max(1, round(log2(max(length, 128) / 64)))
    return [{"bits": bits, "rounds": n, "cap": 64, "window": w} for n, w in ((1, 32), (2, 32), (2, 128), (4, 64))]


def _window(length: int, causal: bool) -> list[Fields]:
    """About as many keys with causality, all behind the query, as without, half of them on each side."""
    return [
        {"window": n if causal else n // 2, "sinks": 4} for n in (64, 128, 256, 512, 1024, 2048) if 2 * n <= length
    ]


def _topk(length: int, causal: bool) -> list[Fields]:
    return [{"k": n, "block": 64, "window": w} for n, w in ((128, 64), (256, 64), (512, 128)) if 2 * (n + w) <= length]


def _ranks(field: str, *values: int) -> Callable[[int, bool], list[Fields]]:
    return lambda length, causal: [{field: n} for n in values if 2 * n <= length]


BUDGETS: dict[str, Callable[[int, bool], list[Fields]]] = {
    "hashed": _hashed,
    "linformer": _ranks("rank", 128, 512),
    "nystrom": _ranks("landmarks", 32, 64, 256),
    "performer": _ranks("features", 128, 256),
    "quantized": lambda length, causal: [{"bits": 8}],
    "random": lambda length, causal: [{"window": w, "sinks": 4, "blocks": n, "block": 64}
                                      for w, n in ((64, 1), (64, 3), (256, 2)) if 2 * (w + 64 * n) <= length],
    "scatterbrain": lambda length, causal: [{"window": w, "features": 128} for w in (64, 256) if 2 * w <= length],
    "topk": _topk,
    "window": _window,
}  # fmt: skip
LEFT_OUT = {
    "dense": "what the others are measured against; every layer may stay dense",
    "graph": "its blocks are the user's, who may give it among `who`",
    "svd": "needs a basis under causality, and is slower than dense attention on CPUs",
    "threshold": "slower than dense attention, or a TopK whose time depends on the text",
}


def candidates(length: int, causal: bool, only: Sequence[str] | None = None) -> list[Mechanism]:
    """Mechanisms to try on layers that read `length` tokens; `only` keeps these names.

    ValueError for names that are unknown, that have no causal form where one is due, or that the planner leaves out.
    """
    for name in only or ():
        if name not in mechanisms():
            raise ValueError(f"unknown attention mechanism {name!r}; expected some of {', '.join(BUDGETS)}")
        if name in LEFT_OUT:
            raise ValueError(f"the planner leaves {name} out: {LEFT_OUT[name]}")
        if causal and not mechanisms()[name].causal:
            raise ValueError(f"{name} has no causal form, and this model is causal: leave it out")
    return [
        cls(**given)
        for name, cls in mechanisms().items()
        if name in BUDGETS and (only is None or name in only) and (cls.causal or not causal)
        for given in BUDGETS[name](length, causal)
    ]
