"""A plain window through the package flash-attn, where it is installed, and a race against another backend.

flash-attn aligns the last query with the last key, as hf_tfast does, and counts its window without the query itself.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from statistics import median
from threading import Lock

import torch
from torch import Tensor

from .score import Score
from .tiles import Layout

__all__ = ["attend_flash", "no_flash", "race", "why_not"]

WIDEST = 256  # heads that its kernels take
RACES = 256  # results that are remembered
MISSING = "the package flash-attn is not installed, or not for this torch: pip install flash-attn --no-build-isolation"
ROUNDS = 5


def attend_flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, score: Score) -> Tensor:
    """Attention of q [b h i d] over k [b g j d], v [b g j e] in a band -> [b h i e], forward and backward."""
    try:
        from flash_attn import flash_attn_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"{MISSING} (its import says: {error})") from error
    o = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=score.factor(q.shape[-1]),
        causal=layout.causal,
        window_size=(layout.before, layout.after),
        softcap=score.softcap or 0.0,
    )
    return o.transpose(1, 2)


def no_flash(layout: Layout, score: Score, start: object) -> str | None:
    """Why flash-attn has no form of a pattern; None where it has."""
    if layout.near is None or layout.lists is not None or layout.sinks:
        return "flash-attn knows one band, without tokens that every query reads (sinks=0)"
    if score.sinks is not None:
        return "flash-attn knows no sink logits"
    if score.dropout:
        return "flash-attn draws its own dropout, which is no function of the call's seed"
    if isinstance(start, Tensor) or start:
        return "flash-attn knows no gap in the cache"
    return None


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Why flash-attn cannot run on these tensors; None where it can."""
    if not _installed():
        return MISSING
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes fp16 and bf16 on CUDA, these are {q.dtype} on {q.device.type}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST or q.shape[-1] % 8:
        return f"flash-attn takes heads of one width, a multiple of 8 up to {WIDEST}; got {q.shape[-1]}, {v.shape[-1]}"
    return None


@cache
def _installed() -> bool:
    return find_spec("flash_attn") is not None


_WON: OrderedDict[Hashable, str] = OrderedDict()
_LOCK = Lock()


def race(about: Hashable, runners: dict[str, Callable[[], Tensor]]) -> str:
    """The name of the fastest of `runners` on CUDA, forward; measured once for each `about` in a process.

    Where nothing can be measured, while a graph is recorded or compiled, it is the first, unless that was done before.
    """
    with _LOCK:
        if about in _WON:
            return _WON[about]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return next(iter(runners))
    with torch.no_grad():
        times = {name: timed(run) for name, run in runners.items()}
    with _LOCK:
        _WON[about] = min(times, key=times.__getitem__)
        while len(_WON) > RACES:
            _WON.popitem(last=False)
        return _WON[about]


def timed(run: Callable[[], Tensor]) -> float:
    """Milliseconds of a call on CUDA: median of a few, after one that compiles and one that warms up."""
    run()
    run()
    took = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return median(took)
