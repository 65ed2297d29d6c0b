"""A model's own sliding window (Mistral, Gemma, gpt-oss, ModernBERT) and a plan's mechanism, both at once."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import Mask, Mechanism, Score
from ..attention.dense import Dense
from ..attention.window import Window

__all__ = ["within"]


def within(mechanism: Mechanism, window: int | None, mask: Mask, keys: int) -> Mechanism:
    """The mechanism that reads what both `mechanism` and a model's `window` allow, in the meaning of `Window`.

    ValueError where the intersection has no exact form.
    """
    gap = mask.start if isinstance(mask.start, int) else int(mask.start.max())
    kept = mask.kept if isinstance(mask.kept, int) else int(mask.kept.max())
    reach = keys + (gap if kept else 0)  # no two positions are further apart than reach - 1
    lost = gap > 0 and kept == 0 and isinstance(mechanism, Window) and mechanism.sinks > 0  # a sliding cache's sinks
    if window is None or (reach <= (window if mask.causal else window + 1) and not lost):
        return mechanism
    if isinstance(mechanism, Dense):
        return Window(window=window)
    if isinstance(mechanism, Window):
        if mechanism.window >= window:
            return Window(window=window)
        if mechanism.sinks == 0:
            return mechanism
        if mask.causal:
            return NearSinks(window=mechanism.window, sinks=mechanism.sinks, reach=window)
    raise ValueError(
        f"this layer has its own sliding window of {window}, and {mechanism} has no exact intersection with it at "
        f"{keys} keys; plan Window(sinks=0) or Dense() for the layers with a sliding window, and name the others"
    )


@dataclass(frozen=True, kw_only=True)
class NearSinks(Window):
    """A causal window whose sinks are read from at most `reach` - 1 positions further on: `Window` within a window.

    Queries below position `reach` see all sinks, those from `reach` + sinks - 1 on see none; between lie sinks - 1.
    """

    name: ClassVar[str] = "window"
    reach: int = 0

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        return super().allowed(choice, b, h, i, j, causal=causal) & (i - j < self.reach)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        i, j = q.shape[2], k.shape[2]
        at = mask.positions(j, q.device)[j - i :]
        all_sinks, some_sinks = (int((at < bound).sum()) for bound in (self.reach, self.reach + self.sinks - 1))
        window = Window(window=self.window)
        o = []
        for low, high, run in (
            (0, all_sinks, replace(window, sinks=self.sinks).fast),
            (all_sinks, some_sinks, self.reference),
            (some_sinks, i, window.fast),
        ):
            if low < high:
                seen = slice(0, j - i + high)
                o.append(run(q[:, :, low:high], k[:, :, seen], v[:, :, seen], mask, score))
        return torch.cat(o, dim=2) if len(o) > 1 else o[0]
