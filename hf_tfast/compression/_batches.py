"""Calibration batches: checked before anything runs, and run through a model whose state is as before afterwards."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Batch", "checked", "cropped", "evaluating", "forward", "valid_rows"]

Batch = dict[str, Any]


def checked(model: PreTrainedModel, batches: Iterable[Mapping[str, Any] | Tensor]) -> list[Batch]:
    """The batches as dicts. ValueError names the first that cannot be used, and what is wrong with it."""
    if isinstance(batches, Mapping | Tensor | str):
        raise ValueError(f"calibration is an iterable of batches, got one {type(batches).__name__}: put it in a list")
    found = []
    for n, batch in enumerate(batches):
        if not isinstance(batch, Mapping | Tensor):
            raise ValueError(
                f"calibration batch {n}: expected a dict of what the model is called with, or a tensor of input_ids, "
                f"got {type(batch).__name__}"
            )
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        _check(model, n, given)
        found.append(given)
    if not found:
        raise ValueError("calibration is empty: give batches of what the model will read, some thousand tokens say")
    return found


def _check(model: PreTrainedModel, n: int, batch: Batch) -> None:
    if batch.get("past_key_values") is not None:
        raise ValueError(f"calibration batch {n}: whole inputs are needed; leave past_key_values out")
    for name, x in batch.items():
        if not isinstance(x, Tensor):
            continue
        if not x.numel():
            raise ValueError(f"calibration batch {n}: {name} is empty, of shape {tuple(x.shape)}")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"calibration batch {n}: {name} holds numbers that are not finite")
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(ids, Tensor) and ids.is_floating_point():
        raise ValueError(f"calibration batch {n}: input_ids are whole numbers, got {ids.dtype}")
    if isinstance(ids, Tensor) and isinstance(size, int) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"calibration batch {n}: input_ids lie between {int(ids.min())} and {int(ids.max())}, the model knows 0 "
            f"to {size - 1}: was another tokenizer used?"
        )
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ValueError(f"calibration batch {n}: attention_mask must be [b n], got shape {tuple(mask.shape)}")
        if not bool(mask.any()):
            raise ValueError(f"calibration batch {n} is all padding: its attention_mask is zero everywhere")


def cropped(batch: Batch, tokens: int) -> Batch:
    """The first rows of a batch, as many as hold about so many tokens, one at least."""
    lead = next((x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 1), None)
    if lead is None:
        return batch
    rows = max(1, tokens // max(1, lead.shape[1]))
    return {
        name: x[:rows] if isinstance(x, Tensor) and x.ndim and len(x) == len(lead) else x for name, x in batch.items()
    }


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside: eval mode and no gradient. Afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's output for a batch, without a cache."""
    given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    return model(**given)


def valid_rows(model: PreTrainedModel, batch: Batch, stack: str, x: Tensor, path: str = "") -> Tensor:
    """Inputs or outputs x [.. d] of a layer in a stack, without padding: [n d].

    ValueError where the batch is padded and nothing tells which of x's rows are padding.
    """
    rows = x.reshape(-1, x.shape[-1])
    if any(word in stack for word in ("vision", "audio", "image")):
        return rows
    second = model.config.is_encoder_decoder and "decoder" in stack.split(".")
    mask = batch.get("decoder_attention_mask" if second else "attention_mask")
    if second and mask is None and batch.get("decoder_input_ids") is None and batch.get("labels") is not None:
        mask = batch["labels"] != -100  # of which the model makes the decoder's inputs
    if mask is None or bool(mask.all()):
        return rows
    mask = mask.to(x.device).bool()
    if mask.numel() == len(rows):
        return rows[mask.flatten()]
    if int(mask.sum()) == len(rows):  # a model that takes padding out itself
        return rows
    raise ValueError(
        f"{path} reads {len(rows)} rows where the batch has {mask.numel()} tokens, so that padding cannot be told "
        "apart: calibrate with rows of equal length, without padding"
    )
