"""The calibrated basis of a layer: two buffers of its attention module.

Buffers with names of their own are saved in the checkpoint (sharded or not), copied, cast and moved with the model.
They exist once `calibrate` has made them, and while a checkpoint that holds them is loaded.

    tfast_basis_q, tfast_basis_k   [g d r]   Score.basis
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._modules import heads_of
from ._stamps import Stamp, stamped_modules

__all__ = [
    "Basis",
    "basis_of",
    "basis_shape",
    "check_loaded",
    "expect_basis",
    "is_causal",
    "lacking",
    "low_rank_layers",
    "remove_basis",
    "set_basis",
]

BUFFERS = ("tfast_basis_q", "tfast_basis_k")
REMEDY = "run hf_tfast.calibrate(model, batches)"

Basis = tuple[Tensor, Tensor]


def basis_of(module: nn.Module, stamp: Stamp, key_heads: int) -> Basis | None:
    """The basis of the `key_heads` key heads that this process computes; None where there is none, or none is due."""
    b, c = (module._buffers.get(name) for name in BUFFERS)
    if b is None or c is None or not stamp.mechanism.calibrated:
        return None
    if b.shape[0] != key_heads:  # tensor parallel: every rank holds all, and takes its part
        if key_heads * (stamp.rank + 1) > b.shape[0] or b.shape[0] % key_heads:
            raise ValueError(
                f"{stamp.path} computes {key_heads} key heads on rank {stamp.rank}, but its calibrated basis has "
                f"{b.shape[0]}: {REMEDY} on the whole model"
            )
        part = slice(stamp.rank * key_heads, (stamp.rank + 1) * key_heads)
        b, c = b[part], c[part]
    return b, c


def set_basis(module: nn.Module, basis: Basis) -> None:
    for name, x in zip(BUFFERS, basis, strict=True):
        module._buffers.pop(name, None)
        module.register_buffer(name, x.contiguous())


def remove_basis(module: nn.Module) -> None:
    for name in BUFFERS:
        if name in module._buffers:
            delattr(module, name)


def is_causal(module: nn.Module) -> bool:
    """Does this attention module say that it is causal, and its config not that it is not?"""
    own = getattr(module, "is_causal", False) is True
    return own and bool(getattr(getattr(module, "config", None), "is_causal", True))


def basis_shape(module: nn.Module, stamp: Stamp) -> tuple[int, int, int] | None:
    """[g d r] of the basis of one of the `low_rank_layers`, read from it and its config; None where it is exact.

    ValueError where neither says how many key heads there are, and how wide.
    """
    g, d = key_heads(module), key_width(module)
    if g is None or d is None:
        raise ValueError(
            f"{stamp.path} ({type(module).__name__}) does not say how many key heads it has and how wide they are: a "
            f"calibrated basis could not be loaded again; plan another mechanism than {stamp.mechanism.name} for it"
        )
    return stamp.mechanism.basis_shape(g, d)


def key_heads(module: nn.Module) -> int | None:
    """Key/value heads of an attention module before any sharding."""
    return _number(module, ("num_key_value_heads", "num_kv_heads")) or heads_of(module)


def key_width(module: nn.Module) -> int | None:
    """Width of a key of one head."""
    width = _number(module, ("head_dim", "attention_head_size", "head_size", "dim_per_head"))
    if width is not None:
        return width
    heads, hidden = heads_of(module), _number(module, ("embed_dim", "hidden_size", "d_model", "dim"))
    return None if heads is None or hidden is None else hidden // heads


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for source in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(value := getattr(source, name, None), int):
                return value
    return None


def low_rank_layers(model: PreTrainedModel) -> list[tuple[nn.Module, Stamp]]:
    """The layers whose mechanism takes a basis."""
    return [(m, stamp) for m, stamp in stamped_modules(model) if stamp.kind == "self" and stamp.mechanism.calibrated]


def lacking(model: PreTrainedModel) -> list[str]:
    """Paths of the layers that cannot run without a basis and have none."""
    needing = [(m, stamp) for m, stamp in low_rank_layers(model) if is_causal(m) and BUFFERS[0] not in m._buffers]
    return [stamp.path for module, stamp in needing if basis_shape(module, stamp) is not None]


def expect_basis(model: PreTrainedModel, stored: list[str] | None) -> list[str]:
    """Make room, before the weights load, for the basis that the checkpoint holds; the names of the new buffers.

    `stored` are the names in the checkpoint, None where they are not known: then causal layers, which cannot run
    without, are taken to have one. ValueError where they need one and the checkpoint has none.
    """
    layers = low_rank_layers(model)
    if stored is None:
        layers = [(module, stamp) for module, stamp in layers if is_causal(module)]
    elif not any(name.endswith(BUFFERS) for name in stored):
        if needing := lacking(model):
            raise ValueError(_lacks(needing[0]))
        return []
    made = []
    for module, stamp in layers:
        if (shape := basis_shape(module, stamp)) is not None:
            set_basis(module, (torch.empty(shape), torch.empty(shape)))
            made += [f"{stamp.path}.{name}" for name in BUFFERS]
    if stored is not None and (held := sum(name.endswith(BUFFERS) for name in stored)) < len(made):
        raise ValueError(_lacks(f"it holds {held} tensors of {len(made)}"))
    return made


def check_loaded(model: PreTrainedModel, expected: list[str]) -> None:
    """ValueError where a buffer that `expect_basis` made has not been filled by the checkpoint."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return  # moved between devices since, and no longer the tensors that were marked as loaded
    for name in expected:
        if not getattr(model.get_buffer(name), "_is_hf_initialized", False):
            raise ValueError(_lacks(name))


def _lacks(what: str) -> str:
    return (
        f"this checkpoint lacks the calibrated basis ({what}), and without it a causal layer cannot run: load the "
        "dense model with quantization_config=FastPlan(...), run hf_tfast.calibrate(model, batches), and save it"
    )
