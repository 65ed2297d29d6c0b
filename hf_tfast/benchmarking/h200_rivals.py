"""What the suite `h200` holds mechanisms against, and first calls whose failure becomes the reason of a line."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import Mask, Mechanism, attend
from .workload import CannotRun, Case, Competitor, Inputs, around, label

Built = tuple[Callable[[], Tensor], tuple[Tensor, ...]]
Build = Callable[[Case, Inputs], Built]


def flash(case: Case, inputs: Inputs) -> Built:
    """SDPA that may take its flash kernel only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = case.heads != case.kv_heads

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

    return around(core, case, inputs)


def sliding(case: Case, inputs: Inputs, *, window: int) -> Built:
    """FlexAttention, compiled, with the sliding window that its own documentation writes; the mask is made
    beforehand."""
    if torch.device(case.device).type != "cuda":
        raise CannotRun(f"FlexAttention is fused, and has a backward pass, on CUDA only, not on {case.device}")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    mask = create_block_mask(near, None, None, case.length, case.length, device=case.device)
    run, grouped = torch.compile(flex_attention, dynamic=False), case.heads != case.kv_heads
    return around(lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=grouped), case, inputs)  # type: ignore[misc]


def mechanism(case: Case, inputs: Inputs, *, of: Mechanism, backend: str) -> Built:
    """A mechanism through one of its backends."""
    mask = Mask(causal=case.causal)
    return around(lambda q, k, v: attend(q, k, v, of, mask, backend=backend), case, inputs)


def tried(case: Case, inputs: Inputs, *, build: Build) -> Built:
    """What `build` makes, after one whole call. CannotRun says why that failed, so that one kernel that does not
    compile on a device leaves the other lines of a table alone; running out of memory is left to the meter."""
    try:
        forward, reached = build(case, inputs)
        with torch.set_grad_enabled(case.passes == "both"):
            o = forward()
            if case.passes == "both":
                torch.autograd.grad(o, reached, inputs.gradient)
    except (CannotRun, torch.OutOfMemoryError):
        raise
    except Exception as error:  # compilers raise classes of their own
        text = (str(error).strip() or "no message").splitlines()[0]
        raise CannotRun(f"{type(error).__name__}: {text[:300]}") from error
    return forward, reached


def rival(name: str, build: Build) -> Competitor:
    return Competitor(name, series=name, build=partial(tried, build=build))


def ours(name: str, of: Mechanism, backend: str = "auto") -> Competitor:
    """A line of its own for each backend: `name`, or `name, backend`."""
    way = "" if backend == "auto" else f", {backend}"
    build = partial(tried, build=partial(mechanism, of=of, backend=backend))
    return Competitor(f"{label(of)}{way}", of, backend=backend, series=f"{name}{way}", build=build)


FLASH = rival("SDPA flash", flash)
