"""Which backend runs a call: what was asked for, or on CUDA the fastest one that can."""

import logging
from functools import cache

import torch
from torch import Tensor

from ..backends import flash, flex, triton_kernels
from ..backends.score import Score
from ._base import Mask, Mechanism

BACKENDS = ("auto", "reference", "torch", "flex", "flash", "triton")
ON_CUDA = ("flex", "flash", "triton")  # fused: what "auto" looks at there, beside plain torch
LEAST = flex.TILE  # queries: fewer fill no tile of a fused kernel

logger = logging.getLogger(__name__)


def choose_backend(
    mechanism: Mechanism,
    backend: str,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    mask: Mask = Mask(),  # noqa: B008 frozen
    score: Score = Score(),  # noqa: B008 frozen
) -> str:
    """The backend that `attend` runs for this request; "auto" without tensors is what a CPU runs.

    On CUDA "auto" takes FlexAttention for patterns that are fixed beforehand, where it can run the call. Where more
    than one could be the fastest (flash-attn for a window; plain torch beside kernels in Triton, and for pairs that
    content chooses, which fill tiles badly), those that can run are timed when such a call is first met in this
    process, forward, and the fastest is kept. A kernel without a backward pass of its own is left out where a gradient
    is asked for. What was chosen stands in the log, at level INFO, once for each mechanism and reason.
    ValueError for a backend that does not exist for the mechanism, or cannot run the call: it says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if q is None or k is None or v is None or q.device.type != "cuda":
            return mechanism.backends[0]
        chosen, why = _fastest(mechanism, q, k, v, mask, score)
        _say(mechanism.name, chosen, why)
        return chosen
    if backend == "reference":
        return backend
    if backend not in mechanism.backends:
        raise ValueError(f"{mechanism.name} has no {backend} path (has: reference, {', '.join(mechanism.backends)})")
    if q is not None and k is not None and v is not None:
        obstacle = _obstacle(mechanism, backend, q, k, v, mask, score)
        if obstacle is not None:
            raise ValueError(f"{mechanism.name} cannot run on backend {backend!r}: {obstacle}")
    return backend


def _fastest(mechanism: Mechanism, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score) -> tuple[str, str]:
    """What runs a call on CUDA, and why nothing faster does."""
    plain, able, reasons = mechanism.backends[0], list[str](), list[str]()
    train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.shape[2] < LEAST:
        return plain, f"fewer than {LEAST} queries"
    for name in ON_CUDA:
        if name in mechanism.backends:
            why = _obstacle(mechanism, name, q, k, v, mask, score)
            if why is None and name in mechanism.forward_only and train:
                why = "its backward pass is plain torch's"
            if why is None:
                able.append(name)
            else:
                reasons.append(f"{name}: {why}")
    if able and (able[-1] == "triton" or type(mechanism).choose is not Mechanism.choose):
        able.append(plain)
    if len(able) < 2:
        return (able[0], "") if able else (plain, "; ".join(reasons))
    return _raced(mechanism, able, q, k, v, Mask(causal=mask.causal), score), f"the fastest of {', '.join(able)}"


def _raced(
    mechanism: Mechanism, names: list[str], q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score
) -> str:  # fmt: skip
    """The fastest of some backends over full rows of about such a size."""
    q, k, v = q.detach(), k.detach(), v.detach()
    run = lambda way: lambda: mechanism.fast(q, k, v, mask, score, way)  # noqa: E731
    size = (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], q.shape[2].bit_length(), k.shape[2].bit_length())
    about = (mechanism, tuple(names), mask.causal, q.dtype, size, str(q.device))
    return flash.race(about, {name: run(name) for name in names})


def _obstacle(
    mechanism: Mechanism, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score
) -> str | None:
    """Why `backend` cannot run a call; None where it can."""
    if why := mechanism.lacks(backend, mask, score):
        return why
    if backend == "flex":
        return flex.why_not(q, v)
    if backend == "flash":
        return flash.why_not(q, v)
    if backend == "triton":
        return triton_kernels.why_not(q)
    return None


@cache
def _say(name: str, chosen: str, why: str) -> None:
    logger.info("%s runs on %s%s", name, chosen, f" ({why})" if why else "")
