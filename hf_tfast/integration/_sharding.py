"""Feed-forward forms under tensor parallelism: which of their layers are cut over the processes, and how.

    gate, up   x -> first (whole on every process) -> second (columns cut)          LowRank
    down       h -> first (rows cut) -> all-reduce over `rank` numbers -> second (whole)

A dense layer down all-reduces over the hidden width instead. Pruned layers are cut as dense ones are; the cores of a
TensorTrain stay whole.
"""

import re
from typing import Any

from transformers import PreTrainedModel

from ..feed_forward.low_rank import LowRankLinear
from ..feed_forward.tensor_train import TensorTrainLinear
from ._forms import planned_blocks
from .plan import FastPlan

__all__ = ["check_places", "check_shardable", "cut_factors", "forbid"]

WHOLE = ("int8", "activation")  # forms that cannot be cut, the first one not at all


def cut_factors(model: PreTrainedModel, plan: FastPlan, rules: dict[str, str]) -> None:
    """Rewrite tensor-parallel rules, {"model.layers.*.mlp.up_proj": "colwise", ...}, for the forms in the model.

    A rule speaks of all layers: where a plan leaves some feed-forwards dense, those stay whole on every process.
    """
    cut: dict[str, str] = {}
    for block, _ in planned_blocks(model, plan):
        for path in block.paths:
            layer, name = block.get(path), re.sub(r"\.\d+(\.|$)", r".*\1", path)
            if isinstance(layer, LowRankLinear | TensorTrainLinear) and (style := rules.pop(name, None)):
                cut[name] = style
            if isinstance(layer, LowRankLinear) and (style := cut.get(name)):
                rules[f"{name}.{'first' if 'row' in style else 'second'}"] = style


def check_shardable(model: Any, plan: FastPlan, converting: bool) -> None:
    """ValueError where the model is being sharded over processes, and the plan's forms cannot be."""
    tensor, data = (getattr(model, name, None) or 1 for name in ("_tp_size", "_fsdp_size"))
    if tensor < 2 and data < 2:
        return
    if converting and plan.every_form:
        raise ValueError(
            "feed-forwards cannot be converted while their weights are sharded: convert in one process, save, and "
            "load the saved folder with this distributed_config"
        )
    kind = "tp_plan" if tensor > 1 else "fsdp_plan"
    if why := _forbidden(plan).get(kind):
        raise ValueError(why)


def check_places(plan: FastPlan, device_map: Any) -> None:
    """ValueError where a device_map puts int8 weights on the disk, which Transformers cannot leave there."""
    form = next((form for form in plan.every_form if form.name == "int8"), None)
    if form is not None and isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(
            f"{form!r} keeps integers, which cannot be offloaded to the disk: give a device_map of GPUs and 'cpu', or "
            "a plan without it (LowRank and Pruned can lie on the disk)"
        )


def forbid(model: Any, plan: FastPlan, on: bool) -> None:
    """While `on`, rules in the model's own parallel plans that make Transformers raise, with the reason, before it
    cuts the first tensor: it asks nobody else by then."""
    for kind, why in _forbidden(plan).items():
        rules = getattr(model, kind, None)
        if isinstance(rules, dict):
            rules.pop(_RULE, None)
            rules.update({_RULE: why} if on else {})


_RULE = "feed_forward"


def _forbidden(plan: FastPlan) -> dict[str, str]:
    """Name of a parallel plan -> why the plan's forms cannot run under it."""
    found: dict[str, str] = {}
    for kind, how, names in (("tp_plan", "tensor parallelism", WHOLE), ("fsdp_plan", "FSDP", WHOLE[:1])):
        if form := next((form for form in plan.every_form if form.name in names), None):
            found[kind] = (
                f"{form!r} does not run under {how}: its numbers cannot be cut into shards. Load it whole in every "
                "process (DDP), or leave the form out of the plan (LowRank and Pruned can be sharded)"
            )
    return found
