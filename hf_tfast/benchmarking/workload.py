"""What is timed: one attention call of a given size, by SDPA or by a mechanism, on the same tensors.

kernel   q [b h l d], k and v [b g l d] are given; the call is attention alone.
module   x [b l h*d] is given; the call projects it to q, k and v, attends and projects back, as a model's layer does.
forward  without gradient. both: forward and backward to everything that a model would train (module: x and weights).

normal   activations are standard normal: every key is as good as any other.
topics   module only: a token belongs to one of length / 64 topics, drawn at random, and two tokens of a topic have a
         cosine of 0.8; so a query's weight lies on keys that are anywhere, as mechanisms that look for them expect.

With left padding the baseline "SDPA" is causal SDPA that ignores the padding: its numbers are wrong, but no SDPA call
is faster, so a speed-up against it is a lower bound. "SDPA masked" is the call that is right: a dense mask, made
beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ..attention import Mask, Mechanism, attend
from .memory import available_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PASSES = ("forward", "both")
LEVELS = ("kernel", "module", "model")
CONTENTS = ("normal", "topics")
TOPIC, ALIKE, LOUD = 64, 0.8, 1.25  # tokens of a topic on average, cosine of two of them, size of an activation


class CannotRun(Exception):
    """A competitor that does not run in a case; the message says why."""


class TooLarge(CannotRun):
    """A case that would not fit; the message says how much it needs and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The size of one attention call. ValueError for what does not make sense."""

    length: int = 1024
    dtype: str = "fp32"
    passes: str = "forward"
    causal: bool = True
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    batch: int = 1
    level: str = "kernel"
    left_padding: int = 0
    device: str = "cpu"
    content: str = "normal"

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("passes", PASSES), ("level", LEVELS), ("content", CONTENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("length", "heads", "kv_heads", "width", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if not 0 <= self.left_padding < self.length:
            raise ValueError(f"left padding must leave tokens: {self.left_padding} of {self.length}")
        if self.content != "normal" and self.level != "module":
            raise ValueError(f"content {self.content!r} is made of activations: it needs level module")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} was asked for, but torch sees no CUDA device; take --device cpu")


@dataclass(frozen=True)
class Competitor:
    """Who runs: a mechanism, or SDPA where there is none. `masked` SDPA is given the padding as a dense mask.

    series  the name under which it is known at all lengths, where its fields depend on the length.
    build   another module instead: what it computes, [b l h*d] at module level, and the tensors that a backward pass
            reaches. CannotRun where it does not run.
    """

    label: str
    mechanism: Mechanism | None = None
    masked: bool = False
    backend: str = "auto"
    series: str = ""
    build: "Callable[[Case, Inputs], tuple[Callable[[], Tensor], tuple[Tensor, ...]]] | None" = None

    @property
    def is_baseline(self) -> bool:
        return self.mechanism is None and not self.masked and self.build is None

    @property
    def line(self) -> str:
        return self.series or self.label


SDPA = Competitor("SDPA")
SDPA_MASKED = Competitor("SDPA masked", masked=True)


def label(mechanism: Mechanism) -> str:
    """Class and the fields that differ from their defaults: Window(window=256)."""
    said = [f"{f.name}={_short(getattr(mechanism, f.name))}" for f in fields(mechanism)  # type: ignore[arg-type]
            if getattr(mechanism, f.name) != f.default]  # fmt: skip
    text = f"{type(mechanism).__name__}({', '.join(said)})" if said else type(mechanism).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _short(value: Any) -> str:
    return f"<{len(value)} lists>" if isinstance(value, tuple) else repr(value)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, shared by its competitors. `gradient` is that of the output."""

    tensors: tuple[Tensor, ...]
    gradient: Tensor
    valid: Tensor | None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Standard normal activations, weights of a linear layer's usual size; the same for equal case and seed."""
    if case.level == "model":
        return Inputs((), torch.ones((), device=case.device), None)
    generator = torch.Generator().manual_seed(seed)
    dtype, inner, outer = DTYPES[case.dtype], case.kv_heads * case.width, case.heads * case.width

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        x = (torch.randn(*shape, generator=generator) * scale).to(case.device, dtype)
        return x.requires_grad_(case.passes == "both")

    if case.level == "kernel":
        shapes = [(case.batch, heads, case.length, case.width) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        tensors, out = tuple(draw(*shape) for shape in shapes), shapes[0]
    else:
        out = (case.batch, case.length, outer)  # type: ignore[assignment]
        weights = [(outer, outer), (inner, outer), (inner, outer), (outer, outer)]
        x = draw(*out) if case.content == "normal" else _topics(case, generator).requires_grad_(case.passes == "both")
        tensors = (x, *(draw(*shape, scale=outer**-0.5) for shape in weights))
    gradient = torch.randn(*out, generator=generator).to(case.device, dtype)
    valid = None
    if case.left_padding:
        valid = torch.ones(case.batch, case.length, dtype=torch.bool, device=case.device)
        valid[:, : case.left_padding] = False
    return Inputs(tensors, gradient, valid)


def _topics(case: Case, generator: torch.Generator) -> Tensor:
    """Activations [b l h*d] of tokens that belong to topics."""
    width, count = case.heads * case.width, max(2, case.length // TOPIC)
    topics = torch.randn(count, width, generator=generator)
    of = torch.randint(count, (case.batch, case.length), generator=generator)
    own = torch.randn(case.batch, case.length, width, generator=generator)
    x = LOUD * (ALIKE**0.5 * topics[of] + (1 - ALIKE) ** 0.5 * own)
    return x.to(case.device, DTYPES[case.dtype])


def workload(case: Case, who: Competitor, inputs: Inputs) -> Callable[[], Any]:
    """The call to time. CannotRun where it does not run, TooLarge where a dense mask would not fit into memory."""
    forward, reached = (who.build or partial(_own, who))(case, inputs)

    def forward_only() -> Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), reached, inputs.gradient)

    return both if case.passes == "both" else forward_only


def _own(who: Competitor, case: Case, inputs: Inputs) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """SDPA or a mechanism in the place of attention."""
    return around(_core(case, who, inputs.valid), case, inputs)


def around(
    core: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case, inputs: Inputs
) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    """`core`, from q [b h l d], k and v [b g l d] to [b h l d], in the place of attention: what to call, and the
    tensors that a backward pass reaches."""

    def forward() -> Tensor:
        if case.level == "kernel":
            return core(*inputs.tensors)
        x, w_q, w_k, w_v, w_o = inputs.tensors
        return join(core(*(split(linear(x, w), case.width) for w in (w_q, w_k, w_v))), w_o)

    return forward, inputs.tensors


def split(x: Tensor, width: int) -> Tensor:
    """[b l h*d] -> [b h l d]"""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def join(o: Tensor, weight: Tensor) -> Tensor:
    """Heads [b h l d] through the output projection: [b l h*d]"""
    return linear(o.transpose(1, 2).flatten(2), weight)


def _core(case: Case, who: Competitor, valid: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if who.mechanism is not None:
        mechanism, mask = who.mechanism, Mask(causal=case.causal, valid=valid)
        return lambda q, k, v: attend(q, k, v, mechanism, mask, backend=who.backend)
    grouped = case.heads != case.kv_heads
    if not who.masked or valid is None:
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)
    needed, free = case.batch * case.length**2, available_memory(case.device)
    if needed > free // 8:  # the kernel makes a floating copy of a boolean mask, and more in the backward pass
        raise TooLarge(
            f"a dense mask takes {needed / 2**30:.1f} GiB before it is copied, {free / 2**30:.1f} GiB are free"
        )
    dense = valid[:, None, None, :].expand(-1, 1, case.length, -1)
    dense = dense.tril() if case.causal else dense.clone()
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=grouped)
