"""dequantise: int8 feed-forwards become plain linear layers again, that hold what the integers stood for.

    dequantise(model).save_pretrained("plain")          # of a plan with Int8 alone: loads without hf_tfast

Lossy    What rounding took from the weights is not given back: each is off by up to half a step, s_o / 254. Inputs are
         no longer rounded, so outputs differ a little from those of the int8 model too.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..feed_forward import Block
from ..feed_forward._base import linear
from ..feed_forward._fused import unfuse
from ..feed_forward.activation import ActivationQuantized
from ..integration._forms import planned_blocks
from ..integration.apply import attach, take_off
from ..integration.plan import FastPlan

__all__ = ["dequantise"]


def dequantise(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Take Int8 out of the model's plan, in place, and return the model; attention and other forms stay.

    dtype   of the new layers; None: the model's own.

    ValueError, with nothing changed, for a model whose plan has no Int8, and where a layer is no longer the plan's own
    (LoRA around it: merge and unload it first).
    """
    plan = getattr(model.config, "quantization_config", None)
    if not isinstance(plan, FastPlan) or not any(form.name == "int8" for form in plan.every_form):
        raise ValueError(f"this {type(model).__name__} has no plan with Int8: there is nothing to dequantise")
    blocks = [block for block, forms in planned_blocks(model, plan) if any(form.name == "int8" for form in forms)]
    found = [(block, path, _stored(block, path)) for block in blocks for path in block.paths]
    if lost := [path for _, path, layers in found if not layers]:
        raise ValueError(
            f"{lost[0]} is a {type(model.get_submodule(lost[0])).__name__} around or instead of int8 layers: take it "
            "off first (of PEFT: merge_and_unload)"
        )
    wanted = model.dtype if dtype is None else dtype
    if not wanted.is_floating_point:
        raise ValueError(f"dtype is a floating one, got {wanted}")
    transposed = _conv1d(model)
    for block, _, layers in found:
        unfuse(block.get(block.ups[0].rpartition(".")[0]))
        for path, layer in layers.items():
            bias = None if layer.bias is None else layer.bias.detach().to(wanted)
            block.replace(path, _dense(layer.dequantised().to(wanted), bias, path in transposed))
    for module in model.modules():
        if isinstance(module, ActivationQuantized):
            module.integers = False
    vars(model).pop("is_loaded_in_8bit", None)
    _replan(model, plan)
    return model


def _stored(block: Block, path: str) -> dict[str, Any]:
    """The int8 layers at or below a path, by path; none where anything else stands around them."""
    from ..feed_forward.int8 import int8_layer

    known = (nn.Linear, ActivationQuantized)  # int8 layers are subclasses of Linear
    top = block.get(path)
    if not isinstance(top, known) and not hasattr(top, "first"):
        return {}
    named = ((f"{path}.{name}" if name else path, module) for name, module in top.named_modules())
    return {where: module for where, module in named if type(module) is int8_layer()}


def _conv1d(model: PreTrainedModel) -> set[str]:
    """Paths at which the dense model has GPT-2's transposed layers, from its config alone."""
    config = deepcopy(model.config)
    for name in ("quantization_config", "attn_implementation"):
        vars(config).pop(name, None)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        bare = type(model)(config)
    return {path for path, module in bare.named_modules() if isinstance(module, Conv1D)}


def _dense(weight: Tensor, bias: Tensor | None, transposed: bool) -> nn.Module:
    if not transposed:
        return linear(weight, bias)
    made = Conv1D(*weight.shape)
    made.weight = nn.Parameter(weight.T.contiguous())
    made.bias = nn.Parameter(made.bias.detach().to(weight) if bias is None else bias)
    return made


def _replan(model: PreTrainedModel, plan: FastPlan) -> None:
    """The plan without Int8, or none where nothing is left of it."""
    rest = plan.to_dict()
    forms, given = _without(rest.pop("feed_forward")), rest.pop("sizes", None) or {}
    if forms:
        kept = {block.down: [f.name != "int8" for f in forms] for block, forms in planned_blocks(model, plan)}
        sizes = {
            down: [size for size, stays in zip(each, kept[down], strict=True) if stays] for down, each in given.items()
        }
        rest |= {"feed_forward": forms, "sizes": {down: each for down, each in sizes.items() if each}}
    if not forms and plan.attention is None:
        take_off(model)
        return
    quantizer: Any = model.hf_quantizer
    quantizer.quantization_config = FastPlan.from_dict(rest)
    attach(model, quantizer, model.config.attn_implementation)


def _without(given: Any) -> Any:
    """A plan's `feed_forward` as config.json has it, without Int8; None where nothing is left."""
    if isinstance(given, list):
        rest = [form for form in given if form["form"] != "int8"]
        return rest[0] if len(rest) == 1 else rest or None
    if "form" in given:
        return None if given["form"] == "int8" else given
    ranges = {layers: _without(forms) for layers, forms in given.items()}
    return {layers: forms for layers, forms in ranges.items() if forms} or None
