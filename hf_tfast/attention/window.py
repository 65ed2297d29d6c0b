"""Window: a query reads its neighbours and the first tokens of the row.

    o_i = sum_j p_ij v_j,   p_i = softmax over {j : allowed(i, j)} of (q_i . k_j) * scale
    causal          allowed(i, j) = j <= i and (i - j < window or j < sinks)
    bidirectional   allowed(i, j) = |i - j| <= window or j < sinks or i < sinks

Shapes   q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
Cost     O(i (window + sinks) (d + e)) time, O(i + j) memory
Exact    fast == reference up to rounding, forward and backward.
Source   Beltagy et al., "Longformer", section 3.1, https://arxiv.org/abs/2004.05150; sinks: Xiao et al., "Efficient
         Streaming Language Models with Attention Sinks", section 3.2, https://arxiv.org/abs/2309.17453
Padding  exact, left, right and packed: the sinks are the first valid tokens of each document.
Causal   yes
Differs  sinks keep the position they were written with; in an encoder they also read everything, as Longformer's
         global tokens do, but with the same projections.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..backends.blocks import Layout, attend_tiles
from ..backends.flash import attend_flash, no_flash
from ..backends.flex_patterns import attend_flex_layout
from ..backends.one_query import Reads, attend_one
from ..backends.score import Score
from ._base import Mask, Mechanism, whole


@dataclass(frozen=True, kw_only=True)
class Window(Mechanism):
    """`window` keys (itself and window - 1 before; without causality `window` on each side) and the first `sinks`."""

    name: ClassVar[str] = "window"
    small: ClassVar[dict[str, Any]] = {"window": 8, "sinks": 2}
    backends: ClassVar[tuple[str, ...]] = ("torch", "flex", "flash")

    window: int = 512
    sinks: int = 0

    def __post_init__(self) -> None:
        whole("window", self.window, 1)
        whole("sinks", self.sinks, 0)

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        return self.near(i, j, causal) | (j < self.sinks) | (i < self.sinks)

    def near(self, i: Tensor, j: Tensor, causal: bool) -> Tensor:
        """The band around the diagonal."""
        return i - j < self.window if causal else (i - j).abs() <= self.window

    def layout(self, causal: bool) -> Layout:
        """The same pattern, for the tiles."""
        return Layout(
            near=partial(self.near, causal=causal),
            before=self.window - 1 if causal else self.window,
            after=0 if causal else self.window,
            sinks=self.sinks,
            open_sinks=not causal,
            causal=causal,
            solid=True,
        )

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        if backend == "flash":
            return attend_flash(q, k, v, self.layout(mask.causal), score)
        if backend == "flex":
            place = {"start": int(mask.start), "kept": int(mask.kept)}
            layout = lambda: self.layout(mask.causal)  # noqa: E731
            return attend_flex_layout(q, k, v, layout, score, key=(self, mask.causal), **place)
        if q.shape[2] == 1 and mask.causal and not score.dropout:
            return self._step(q, k, v, mask, score)
        return attend_tiles(q, k, v, self.layout(mask.causal), score, start=int(mask.start), kept=int(mask.kept))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score) -> Tensor:
        """One query under causality: the keys that it reads are two slices."""
        j, start, kept = k.shape[2], int(mask.start), int(mask.kept)
        if start and self.sinks > kept:
            raise ValueError(
                f"the first {self.sinks} keys are read, but a sliding cache dropped {start} and kept {kept}"
            )
        oldest = j + start - self.window  # position where the window begins; before the gap it is an index, too
        first = max(oldest, 0) if oldest < kept or not start else max(j - self.window, kept)
        return attend_one(q, k, v, Reads(first, j, min(self.sinks, first)), score)

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        return no_flash(self.layout(mask.causal), score, mask.start) if backend == "flash" else None

    def full(self, length: int) -> "Window":
        return replace(self, window=max(length, 1))
