"""Which tokens of a batch count, and what of it a model is called with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .losses import IGNORED, next_tokens

__all__ = ["aligned_labels", "inner", "kept_states", "kept_targets", "main_input", "model_inputs"]

LABELS = ("labels", "shift_labels", "num_items_in_batch")


def inner(model: Any) -> PreTrainedModel:
    """The Transformers model within wrappers of PEFT and torch."""
    while isinstance(getattr(model, "module", None), nn.Module) and not isinstance(model, PreTrainedModel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def main_input(batch: Mapping[str, Any]) -> Tensor:
    """[b n ..] what the tokens of a batch are read from."""
    for name in ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"):
        if isinstance(batch.get(name), Tensor):
            return batch[name]
    raise ValueError(f"a batch holds input_ids or another main input, got only {', '.join(batch) or 'nothing'}")


def aligned_labels(batch: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """[b n] what the model's output at each position should be, IGNORED where it does not matter; None: no labels.

    shifts  labels are those of the inputs, and the model predicts the next one, as causal models do.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    return next_tokens(labels) if labels is not None and shifts else labels


def kept_targets(batch: Mapping[str, Any], shifts: bool, pad: int | None) -> Tensor:
    """[b n] bool: positions whose output is compared. Those with labels; without labels those of all tokens."""
    labels = aligned_labels(batch, shifts)
    return kept_states(batch, pad) if labels is None else labels != IGNORED


def kept_states(batch: Mapping[str, Any], pad: int | None) -> Tensor:
    """[b n] bool: tokens that are not padding, by the attention_mask; without one all that are not the pad token."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
    x = main_input(batch)
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without labels, so that a model does not compute a loss of its own, and without a cache."""
    given = {name: x for name, x in batch.items() if name not in LABELS}
    config: Any = model.config
    if config.is_encoder_decoder and given.get("decoder_input_ids") is None and batch.get("labels") is not None:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[operator]
    if getattr(config, "use_cache", None) is not None:
        given["use_cache"] = False
    return given
