"""Which backend runs a call: what was asked for, or on CUDA the fastest one that can."""

import logging
from functools import cache

from torch import Tensor

from ..backends import flash, flex
from ..backends.score import Score
from ._base import Mask, Mechanism

BACKENDS = ("auto", "reference", "torch", "flex", "flash", "triton")
ON_CUDA = ("flex",)  # what "auto" prefers there, before plain torch
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

    On CUDA "auto" takes FlexAttention where the mechanism has a form of it for such a call, else plain torch; a window
    goes to flash-attn where that is installed, can run the call, and was the faster of the two when they first met in
    this process. What was chosen stands in the log, at level INFO, once for each mechanism and reason.
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
    call, reasons = (q, k, v, mask, score), []
    if q.shape[2] < LEAST:
        return mechanism.backends[0], f"fewer than {LEAST} queries"
    for name in ON_CUDA:
        if name in mechanism.backends:
            why = _obstacle(mechanism, name, *call)
            if why is None:
                return _against_flash(mechanism, name, *call)
            reasons.append(f"{name}: {why}")
    return mechanism.backends[0], "; ".join(reasons)


def _against_flash(
    mechanism: Mechanism, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score
) -> tuple[str, str]:
    if "flash" not in mechanism.backends or _obstacle(mechanism, "flash", q, k, v, mask, score):
        return name, ""
    run = lambda way: mechanism.fast(q.detach(), k.detach(), v.detach(), mask, score, way)  # noqa: E731
    size = (*q.shape[:2], k.shape[1], q.shape[3], q.shape[2].bit_length(), k.shape[2].bit_length())
    about = (mechanism, mask.causal, q.dtype, size, str(q.device))
    if mask.valid is not None or mask.segments is not None:
        return name, "padded or packed rows are not raced against flash-attn"
    faster = flash.race(about, {"flash": lambda: run("flash"), name: lambda: run(name)})
    return faster, f"the faster of flash and {name}"


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
    return None


@cache
def _say(name: str, chosen: str, why: str) -> None:
    logger.info("%s runs on %s%s", name, chosen, f" ({why})" if why else "")
