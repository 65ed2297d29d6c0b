"""apply_plan and remove_plan: put a plan on a live model and take it off."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils import logging

from ..attention import Mechanism, mechanisms
from ..attention.dense import Dense
from ..feed_forward import Block, Form, Moments
from ._basis import is_causal, remove_basis
from ._forms import Sizes, make_forms, restore_forms
from ._modules import Found, Survey, heads_of, parts_of, survey
from ._positions_check import guard_positions, unguard_positions
from ._ranges import check_layers, names_of, planned_stacks
from ._stamps import NAME, Stamp, last_run, set_stamp, stamp_of, stamped_modules
from .cache import bound_cache, unbound_cache
from .plan import FastPlan, SavedFastPlan

__all__ = ["apply_plan", "remove_plan"]

logger = logging.get_logger(__name__)


def apply_plan(model: PreTrainedModel, plan: FastPlan) -> PreTrainedModel:
    """Make a loaded model run the plan, in place, and return it; `save_pretrained` then saves the plan too.

    ValueError, with nothing changed, where a planned layer does not exist, where an attention module that the plan
    means does not go through Transformers' interface, for a model that already has a plan or another quantisation, and
    for one that is sharded, offloaded or on meta. A model that Transformers has loaded with BitsAndBytesConfig takes
    attention: the plan has that config as its base from then on. A plan with SVD on causal layers is applied first and
    calibrated then, `calibrate(model, batches)`: until that the model neither runs nor saves.
    """
    check_new_plan(model, plan)
    base = model.config.quantization_config if _on_a_base(model) else None
    return put_plan(model, plan if base is None else FastPlan(attention=plan.attention, base=base))


def check_new_plan(model: PreTrainedModel, plan: FastPlan) -> None:
    """ValueError unless `model` is whole, dense and Transformers' own, and `plan` a plan."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a Transformers model, got {type(model).__name__}; unwrap it first")
    if not isinstance(plan, FastPlan):
        raise ValueError(f"expected a FastPlan, got {plan!r}")
    if plan.base is not None:
        raise ValueError(
            "the base of a plan is made while weights load: from_pretrained(name, quantization_config=plan); a model "
            "that is loaded with it already takes a plan without"
        )
    if _on_a_base(model) and not plan.every_form:
        return
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"the model already has a plan or quantisation ({model.config.quantization_config!r}); "
            "call remove_plan(model) first, or start from the dense checkpoint"
        )
    check_whole(model)


def _on_a_base(model: PreTrainedModel) -> bool:
    """Has Transformers quantised the model in a way that a plan can stand on?"""
    given = getattr(model.config, "quantization_config", None)
    return isinstance(given, BitsAndBytesConfig) and isinstance(getattr(model, "hf_quantizer", None), HfQuantizer)


def put_plan(
    model: PreTrainedModel,
    plan: FastPlan,
    moments: dict[str, Moments] | None = None,
    fit: Callable[[Block, tuple[Form, ...]], None] | None = None,
) -> PreTrainedModel:
    """`apply_plan` after its checks; `moments` and `fit` as `make_forms` takes them."""
    sizes, undo = make_forms(model, plan, moments, fit)
    try:
        _own_configs(model)
        implementation = stamp_model(model, plan, dense=_implementation(model.config))
    except Exception:
        undo()
        raise
    from .quantizer import FastQuantizer  # the quantiser applies plans itself

    attach(model, FastQuantizer(saved(plan, sizes), pre_quantized=True), implementation)
    return model


def remove_plan(model: PreTrainedModel, *, attention_only: bool = False) -> PreTrainedModel:
    """Take a plan off, in place, and return the model: dense again, and a plain checkpoint once saved.

    ValueError, with nothing changed, for feed-forwards whose dense weights are gone. `attention_only` leaves every
    feed-forward as it is, in a plan of its own.
    """
    plan = getattr(model.config, "quantization_config", None)
    if not isinstance(plan, FastPlan):
        raise ValueError(f"this {type(model).__name__} has no plan to remove")
    if plan.every_form and not attention_only:
        restore_forms(model, plan)
    if plan.every_form and attention_only:
        if plan.attention is not None:
            _remove_attention(model)
        rest = {name: value for name, value in plan.to_dict().items() if name != "attention"}
        quantizer: Any = model.hf_quantizer
        quantizer.quantization_config = FastPlan.from_dict(rest)
        attach(model, quantizer, NAME)
        return model
    take_off(model)
    return model


def take_off(model: PreTrainedModel) -> None:
    """Take everything of a plan off but the feed-forwards, whatever they are now."""
    plan: Any = model.config.quantization_config
    if plan.attention is not None:
        _remove_attention(model)
    if plan.base is not None:
        model.config.quantization_config = plan.base
        quantizer: Any = model.hf_quantizer
        model.hf_quantizer = quantizer.inner
        del model.config.attn_implementation
        return
    del model.config.quantization_config
    for holder, name in (
        (model.config, "attn_implementation"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(holder):
            delattr(holder, name)


def _remove_attention(model: PreTrainedModel) -> None:
    dense = next((stamp.dense for _, stamp in stamped_modules(model)), "sdpa")
    for module, _ in stamped_modules(model):
        set_stamp(module, None)
        unbound_cache(module)
        remove_basis(module)
        _remove_hook(module)
    unguard_positions(model)
    for owner in _owners(model):
        if owner.config._attn_implementation == NAME:
            owner.config._attn_implementation = {"": dense}


def stamp_model(
    model: PreTrainedModel, plan: FastPlan, dense: str = "sdpa", active: bool = True
) -> str | dict[str, Any]:
    """Stamp every attention module and return what config.json must say about the implementation.

    `active` False: stamps only, the implementation that was asked for keeps running. A plan without attention stamps
    nothing; its config still names `tfast`, so that no process without hf_tfast loads it unawares.
    """
    if plan.attention is None:
        return NAME
    _check_free(model)
    found = survey(model)
    planned = planned_stacks(found, plan.ranges)
    check_layers(found, plan.ranges, planned, "self-attention")
    for stack in planned:
        if found.outside.get(stack) and _asks_for_more(found, plan, stack, planned):
            listed, layers = "\n  ".join(found.outside[stack][:4]), found.layers(stack)
            remedy = f"\nName the layers that a plan reaches: {stack}.{layers[0]} for instance" if layers else ""
            raise ValueError(
                f"{type(model).__name__} has attention that a plan cannot reach (it would stay dense silently):\n"
                f"  {listed}{remedy}"
            )
    if not any(f.kind == "self" and f.stack in planned for f in found.found):
        raise ValueError(f"{type(model).__name__} has no self-attention that goes through Transformers' interface")
    _check_causal(found, plan, planned)
    if dense not in ("sdpa", "eager"):
        raise ValueError(f"dense layers of a plan run 'sdpa' or 'eager', got attn_implementation={dense!r}")
    for f in found.found:
        mechanism = _mechanism(plan, f, planned)
        where: dict[str, Any] = {"path": f.path, "stack": f.stack, "layer": f.layer, "kind": f.kind}
        set_stamp(f.module, Stamp(**where, mechanism=mechanism, dense=dense, heads=heads_of(f.module)))
        if f.kind == "self":
            bound_cache(f.module)
        if f.stack in planned and active:
            f.module.register_forward_hook(_was_called)
    guard_positions(model)
    configs = [owner.config for owner in _owners(model, [f.path for f in found.found if f.stack in planned])]
    if active:
        for config in configs:
            config._attn_implementation = {"": NAME}
    return _saved_implementation(model.config, {id(config) for config in configs})


def _check_free(model: PreTrainedModel) -> None:
    """Raise for models whose own config says what their attention computes."""
    for path, module in model.named_modules():
        if getattr(module, "attention_in_config", False):
            raise ValueError(
                f"{path or 'this model'} ({type(module).__name__}) has its attention in its config, and a plan would "
                "contradict that: load it with from_pretrained(folder, attention=Window(window=512)), or set "
                "config.attention before the model is made; a plan for such a model can hold feed-forwards only"
            )


def attach(model: PreTrainedModel, quantizer: Any, implementation: str | dict[str, Any]) -> None:
    """Let the model carry its plan: saved with it, but not pretending that its weights hold integers, unless they are
    those of a base."""
    model.config.quantization_config = quantizer.quantization_config
    model.config.attn_implementation = implementation
    if quantizer.inner is not None:
        method = quantizer.inner.quantization_config.quant_method
        for name, value in (("hf_quantizer", quantizer), ("quantization_method", method), ("is_quantized", True)):
            setattr(model, name, value)
        return
    for name, value in (("hf_quantizer", quantizer), ("quantization_method", "tfast"), ("is_quantized", False)):
        setattr(model, name, value)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized


def saved(plan: FastPlan, sizes: Sizes | None = None) -> SavedFastPlan:
    """The plan as a checkpoint has it, with the sizes of the forms that were made."""
    if isinstance(plan, SavedFastPlan):
        return plan
    return FastPlan.from_dict({**plan.to_dict(), **({"sizes": sizes} if sizes else {})})


def _saved_implementation(config: PreTrainedConfig, planned: set[int]) -> str | dict[str, Any]:
    """The name, or a dict that names the sub-configs that run it: Transformers reads either from config.json."""
    subs = {}
    for name in getattr(config, "sub_configs", {}):
        if isinstance(sub := getattr(config, name, None), PreTrainedConfig):
            subs[name] = _saved_implementation(sub, planned)
    subs = {name: value for name, value in subs.items() if value}
    if id(config) in planned:
        return {"": NAME, **subs} if getattr(config, "sub_configs", {}) else NAME
    return subs


def _own_configs(model: PreTrainedModel) -> None:
    """Give the model config objects of its own: two models made from one config object share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, deepcopy(value, copies))


def _mechanism(plan: FastPlan, f: Found, planned: list[str]) -> Mechanism:
    if f.kind == "cross" or f.stack not in planned:
        return Dense()
    return plan.mechanism(f.layer, names_of(f.stack, planned))


def _check_causal(found: Survey, plan: FastPlan, planned: list[str]) -> None:
    for f in found.found:
        mechanism = _mechanism(plan, f, planned)
        if is_causal(f.module) and not (mechanism.causal or mechanism.calibrated):  # the latter once it is calibrated
            able = ", ".join(name for name, cls in mechanisms().items() if cls.causal)
            raise ValueError(
                f"{f.path} is causal, and {mechanism.name} has no causal form; mechanisms that have: {able}"
            )


def _asks_for_more(found: Survey, plan: FastPlan, stack: str, planned: list[str]) -> bool:
    """Are there layers outside the interface that the plan means? Not when every range names a layer inside it."""
    have = found.layers(stack)
    if not have or not plan.ranges:
        return True
    mine = [layers for layers in plan.ranges if layers.stack in tuple(names_of(stack, planned))]
    return not all(
        layers.last is not None and all(n in have for n in range(layers.first, layers.last + 1)) for layers in mine
    )


def check_whole(model: PreTrainedModel) -> None:
    """Raise for a model whose weights are not all here."""
    remedy = (
        "convert in one process (apply_plan, then save_pretrained), and load the saved folder sharded or offloaded"
    )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is on the meta device or offloaded: {remedy}")
        if (
            hasattr(parameter, "ds_id")
            or type(parameter.data).__name__ == "DTensor"
            or hasattr(parameter, "_fsdp_flattened")
        ):
            raise ValueError(f"{name} is sharded over processes: {remedy}")
    for path, module in model.named_modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"{path or 'the model'} is offloaded: {remedy}")


def _implementation(config: PreTrainedConfig) -> str:
    """What the model runs now, for the layers that stay dense."""
    values = {part._attn_implementation for _, part in parts_of(config)} - {None, NAME}
    chosen = config.get_text_config()._attn_implementation if len(values) > 1 else next(iter(values), "sdpa")
    return "sdpa" if chosen is None or chosen.startswith(f"{NAME}") else chosen


def _owners(model: PreTrainedModel, paths: list[str] | None = None) -> list[PreTrainedModel]:
    """The models inside a model; with `paths`, only the innermost ones around these modules. Configs are met once."""
    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    if paths is None:
        return list(owners.values())
    inner = {max((o for o in owners if o == "" or path.startswith(f"{o}.")), key=len) for path in paths}
    return [owners[path] for path in sorted(inner)]


def _was_called(module: nn.Module, args: Any, output: Any) -> None:
    """After a module's first forward: the dispatcher must have run, or the module would be dense silently."""
    if torch.compiler.is_compiling():
        return
    stamp = stamp_of(module)
    if stamp is not None and last_run(module) is None:
        config = getattr(module, "config", None)
        if config is None or config._attn_implementation == NAME:
            raise ValueError(
                f"{stamp.path} ({type(module).__name__}) ran without asking Transformers' attention interface: the "
                "plan had no effect on it. This model cannot run an attention plan"
            )
    _remove_hook(module)


def _remove_hook(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if hook is _was_called:
            del module._forward_hooks[key]
