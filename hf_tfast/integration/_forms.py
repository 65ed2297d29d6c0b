"""The feed-forwards of a plan, put into a model: made from weights, or from the sizes that a saved plan carries."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..feed_forward import Block, Form, Moments
from ..feed_forward._base import STORES
from ..feed_forward._fused import unfuse
from ._feed_forwards import feed_forwards
from ._modules import Found, Survey, survey
from ._ranges import check_layers, names_of, planned_stacks
from .plan import FastPlan

__all__ = ["build_forms", "check_filled", "make_forms", "planned_blocks", "restore_forms", "start_forms"]

Sizes = dict[str, list[dict[str, Any]]]  # path of the layer down -> what each form decided


def planned_blocks(model: PreTrainedModel, plan: FastPlan) -> list[tuple[Block, tuple[Form, ...]]]:
    """The feed-forwards that the plan changes, each with its forms in order. Changes nothing; works on meta.

    ValueError where the model has no feed-forward known by structure, and for layers and stacks it does not have.
    """
    if not plan.every_form:
        return []
    blocks = feed_forwards(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward that is known by its structure (gate_proj/up_proj/down_proj, "
            "fc1/fc2, intermediate.dense/output.dense, c_fc/c_proj, wi/wo, ...): leave feed_forward out of the plan"
        )
    found = [Found(b.down, b.get(b.down), b.stack, b.layer, "self") for b in blocks]
    known = Survey(found, {}, survey(model).vision)
    planned = planned_stacks(known, plan.feed_forward_ranges)
    check_layers(known, plan.feed_forward_ranges, planned, "a feed-forward")
    wanted = [(b, plan.forms(b.layer, names_of(b.stack, planned))) for b in blocks if b.stack in planned]
    return [(block, forms) for block, forms in wanted if forms]


def make_forms(
    model: PreTrainedModel,
    plan: FastPlan,
    moments: dict[str, Moments] | None = None,
    fit: Callable[[Block, tuple[Form, ...]], None] | None = None,
) -> tuple[Sizes, Callable[[], None]]:
    """Replace the planned feed-forwards, from their weights, in place: the sizes, and a function that undoes it.

    moments   of the inputs of their layers, where a form is made from data (see compression's `convert`).
    fit       called with every block and its forms while its weights can still be trained (compression's recovery).

    ValueError, with nothing changed, where weights are not here or do not suit a form.
    """
    wanted = planned_blocks(model, plan)
    before = [(block, path, block.get(path)) for block, _ in wanted for path in block.paths]

    def undo() -> None:
        for block, path, module in before:
            unfuse(block.get(path.rpartition(".")[0]))
            block.replace(path, module)
        vars(model).pop("is_loaded_in_8bit", None)

    for _, path, module in before:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(
                f"{path} is on the meta device or offloaded: convert in one process with all weights in memory, save, "
                "and load the saved folder as you wish"
            )
    sizes: Sizes = {}
    try:
        seen = dict(moments) if moments is not None else None  # pruning narrows what later forms see
        for block, forms in wanted:
            sizes[block.down] = [form.apply(block, moments=seen) for form in forms if form.order < STORES]
            if fit is not None:
                fit(block, forms)
            sizes[block.down] += [form.apply(block, moments=seen) for form in forms if form.order >= STORES]
        finish_forms(model, wanted)
    except BaseException:  # Ctrl-C during a fit too
        undo()
        raise
    return sizes, undo


def start_forms(model: PreTrainedModel, forms: Callable[[int], tuple[Form, ...]]) -> None:
    """Give the layers of a new model their forms, which follow from shapes: `forms` says those of a layer."""
    for block in feed_forwards(model):
        for form in forms(block.layer):
            form.apply(block)


def finish_forms(model: PreTrainedModel, wanted: list[tuple[Block, tuple[Form, ...]]]) -> None:
    """What follows once the weights of the planned feed-forwards are there."""
    for block, forms in wanted:
        for form in forms:
            form.finish(block)
    if any(form.name == "int8" for _, forms in wanted for form in forms):
        model.is_loaded_in_8bit = True  # type: ignore[assignment]  # PEFT asks this before it wraps int8 layers as such


def build_forms(model: PreTrainedModel, plan: FastPlan) -> list[str]:
    """Build the planned feed-forwards on the meta device, for a checkpoint that holds them: the names of its tensors.

    ValueError where the sizes in the plan are missing, or do not fit the model.
    """
    wanted, sizes = planned_blocks(model, plan), plan.sizes or {}
    if sorted(sizes) != sorted(block.down for block, _ in wanted):
        raise ValueError(
            "the plan in config.json does not say the sizes of every feed-forward it changes (or of others): it is "
            f"corrupt. It has {len(sizes)}, the model {len(wanted)}"
        )
    for block, forms in wanted:
        given = sizes[block.down]
        if not isinstance(given, list) or len(given) != len(forms):
            raise ValueError(f"the plan in config.json has {len(forms)} forms for {block.down}, but sizes {given!r}")
        for form, size in zip(forms, given, strict=True):
            try:
                form.apply(block, size=size)
            except (KeyError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"the plan in config.json gives {block.down} the sizes {size!r}, which do not fit {form!r}: it is "
                    f"corrupt ({error})"
                ) from error
    return [f"{path}.{name}" for block, _ in wanted for path in block.paths for name in block.get(path).state_dict()]


def check_filled(model: PreTrainedModel, expected: list[str]) -> None:
    """After the weights have loaded. ValueError where a tensor of `build_forms` was not filled by the checkpoint, and
    where int8 layers hold what cannot be theirs."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return  # moved between devices since, and no longer the tensors that were marked as loaded
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if missing := [name for name in expected if not getattr(tensors[name], "_is_hf_initialized", False)]:
        raise ValueError(
            f"the plan in config.json needs {missing[0]} ({len(missing)} tensors in all), and the checkpoint does not "
            "hold it: the folder is truncated, or its config.json belongs to other weights"
        )
    for name in expected:
        scale = tensors[name]
        if name.endswith(".SCB") and not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ValueError(
                f"{name}, the scales of int8 weights, lie between {float(scale.min()):g} and {float(scale.max()):g}, "
                "where finite ones of at least 0 are due: the checkpoint is corrupt"
            )


def restore_forms(model: PreTrainedModel, plan: FastPlan) -> None:
    """Put the dense layers back. ValueError, with nothing changed, where a form has thrown their weights away."""
    if lost := [form for form in plan.every_form if not form.lossless]:
        rounded = "; hf_tfast.dequantise(model) gives plain layers with the rounded weights"
        raise ValueError(
            f"{lost[0]!r} has replaced the dense weights, which cannot be computed back: load the dense checkpoint "
            "again, or take off the attention alone with remove_plan(model, attention_only=True)"
            f"{rounded if lost[0].name == 'int8' else ''}"
        )
    for block, forms in planned_blocks(model, plan):
        for form in reversed(forms):
            form.restore(block)
