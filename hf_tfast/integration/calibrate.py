"""calibrate: the basis with which low-rank attention scores run, measured on real input and stored with the model.

    plan = FastPlan(attention=SVD(rank=16, keys=256))
    model = AutoModelForCausalLM.from_pretrained("any/model", quantization_config=plan)
    calibrate(model, batches)
    model.save_pretrained("fast")       # the plan carries the rank, the checkpoint the basis

For every layer and key head, over all queries q of the heads that share it and all keys k of all batches:

    R_q, R_k  the R factors of Q = (q_1, q_2, ...) and K: R_q^T R_q = sum q q^T, kept up to date batch by batch
    B, C      best of rank r for Q K^T (Eckart and Young), from the d x d core R_q R_k^T as in attention/svd.py

Q K^T counts every query with every key, those of other documents and later ones too: what a query will meet when the
basis is used is not known beforehand, and a statistic of pairs would not fit into O(d^2) memory.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..attention import Mask, Mechanism, Score
from ..attention.dense import Dense
from ..attention.svd import best_basis
from ..backends.rows import group
from ._basis import Basis, basis_shape, low_rank_layers, set_basis
from ._stamps import NAME, Stamp, set_stamp
from .apply import check_whole
from .plan import FastPlan

__all__ = ["calibrate"]


def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, Any] | Tensor]) -> PreTrainedModel:
    """Measure the basis of every layer to which the plan of `model` gives SVD, in place, and return the model.

    batches   what the model is called with: dicts (input_ids, attention_mask, ...) or tensors of input_ids; any
              iterable, read once. A few thousand tokens, of the kind and the length that the model will read:
              rotary positions turn queries and keys, so that a basis is for the lengths that it was made from.

    The batches run through the model in eval mode, without gradient or cache; layers of SVD compute dense attention
    meanwhile, all others what the plan gives them. Padding counts for nothing. The basis is stored as two buffers of
    each attention module, in the dtype of its queries, so that it is saved, cast and moved with the model; causal
    layers cannot run or be saved without, and bidirectional ones use it from then on instead of one per row. Calling
    it again replaces the basis. Layers whose rank is at least their key width are exact and need none.

    ValueError, with nothing changed, for a model without such a plan or one that is sharded or offloaded, and for
    batches that are empty, hold fewer valid tokens than the rank, or lead to queries or keys that are not finite.
    """
    layers = _layers(model)
    with _listening(model, layers):
        _run(model, batches)
    # all of them before the first is stored
    made = [(layer.module, layer.basis()) for layer in layers]
    for module, basis in made:
        if basis is not None:
            set_basis(module, basis)
    return model


@dataclass(eq=False)
class _Factors:
    """R factors of the queries and keys that one layer has met, [g m d] with m <= d, in float64; `tokens` of them."""

    q: Tensor | None = None
    k: Tensor | None = None
    tokens: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def add(self, q: Tensor, k: Tensor) -> None:
        """q [b h i d], k [b g j d] of valid tokens."""
        for name, x in (("queries", q), ("keys", k)):
            if not bool(x.isfinite().all()):
                raise ValueError(f"{name} are not finite on a batch: a basis cannot be calibrated on them")
        self.q, self.k = self._join(self.q, group(q, k.shape[1])), self._join(self.k, k)
        self.tokens += k.shape[0] * k.shape[2]
        self.dtype, self.device = k.dtype, k.device

    @staticmethod
    def _join(factor: Tensor | None, x: Tensor) -> Tensor:
        where = "cpu" if x.device.type == "mps" else x.device  # which has no float64
        rows = x.to(where, torch.float64).transpose(0, 1).flatten(1, 2)
        return torch.linalg.qr(rows if factor is None else torch.cat([factor, rows], dim=1), mode="r").R


@dataclass(frozen=True, kw_only=True, eq=False)
class _Listening(Mechanism):
    """Dense attention that takes note of what it is called with: full rows, so of valid tokens only."""

    name: ClassVar[str] = "calibration"

    planned: Mechanism
    factors: _Factors = field(default_factory=_Factors, repr=False)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        return Dense().reference(q, k, v, mask, replace(score, basis=None))

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        self.factors.add(q, k)
        return Dense().fast(q, k, v, mask, score)


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    stamp: Stamp
    shape: tuple[int, int, int]  # of its basis, as read from the module: the one that loading will expect
    listener: _Listening

    def basis(self) -> Basis:
        """The best basis for what the layer has met. ValueError where that is not enough."""
        factors, (g, d, rank) = self.listener.factors, self.shape
        path = self.stamp.path
        if factors.q is None or factors.k is None:
            raise ValueError(f"{path} has met no valid token in these batches: all was padding, or nothing came")
        if factors.tokens < rank:
            raise ValueError(f"{path} has met {factors.tokens} valid tokens, but a basis of rank {rank} needs more")
        met = (factors.k.shape[0], factors.k.shape[2])
        if met != (g, d):
            raise ValueError(
                f"{path} ({type(self.module).__name__}) computes {met[0]} key heads of width {met[1]}, but it and its "
                f"config say {g} of width {d}: its basis could not be loaded again; plan another mechanism for it"
            )
        b, c = (x.to(factors.device, factors.dtype) for x in best_basis(factors.q, factors.k, rank))
        b, c = (F.pad(x, (0, rank - x.shape[-1])) for x in (b, c))  # queries of fewer dimensions than the rank
        if not bool(b.isfinite().all() & c.isfinite().all()):
            raise ValueError(f"{path}: its basis exceeds the range of {factors.dtype}; calibrate in bfloat16")
        return b, c


def _layers(model: PreTrainedModel) -> list[_Layer]:
    """The layers to calibrate."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a Transformers model, got {type(model).__name__}; unwrap it first")
    if not isinstance(getattr(model.config, "quantization_config", None), FastPlan):
        raise ValueError(
            f"this {type(model).__name__} has no plan: load it with quantization_config=FastPlan(attention=SVD(...)), "
            "or call apply_plan(model, plan), and calibrate it then"
        )
    check_whole(model)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError("the heads are sharded over processes: calibrate in one process, save, and load that sharded")
    layers = []
    for module, stamp in low_rank_layers(model):
        running = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
        if running != NAME:
            raise ValueError(f"{stamp.path} runs attn_implementation={running!r} instead of its plan: load without it")
        if (shape := basis_shape(module, stamp)) is not None:
            layers.append(_Layer(module, stamp, shape, _Listening(planned=stamp.mechanism)))
    if not layers:
        raise ValueError("the plan has no layer to calibrate: SVD of a rank below the key width is what takes a basis")
    return layers


@contextmanager
def _listening(model: PreTrainedModel, layers: list[_Layer]) -> Iterator[None]:
    """Inside, the layers listen, and the whole model is in eval mode; restored exactly afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in layers:
            set_stamp(layer.module, replace(layer.stamp, mechanism=layer.listener))
        yield
    finally:
        for layer in layers:
            set_stamp(layer.module, layer.stamp)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _run(model: PreTrainedModel, batches: Iterable[Mapping[str, Any] | Tensor]) -> None:
    """All batches through the model."""
    cached = "use_cache" in inspect.signature(model.forward).parameters
    n = -1
    for n, batch in enumerate(batches):
        if not isinstance(batch, Mapping | Tensor):
            raise ValueError(
                f"batch {n}: expected a dict of what the model is called with, or a tensor of input_ids, got "
                f"{type(batch).__name__}"
            )
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        if given.get("past_key_values") is not None:
            raise ValueError(f"batch {n}: calibration takes whole inputs; leave past_key_values out")
        given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in given.items()}
        model(**{**given, "use_cache": False} if cached else given)
    if n < 0:
        raise ValueError("batches is empty: give some input that the model will meet, a few thousand tokens say")
