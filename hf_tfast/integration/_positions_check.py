"""A clear error where an input is longer than a model's table of learned positions, instead of torch's IndexError."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["guard_positions", "unguard_positions"]

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def guard_positions(model: PreTrainedModel) -> None:
    """Watch every module that owns a table of learned positions; the table's size is read at each call."""
    unguard_positions(model)
    for module in model.modules():
        if _table(module) is not None:
            module.register_forward_pre_hook(_check_length, with_kwargs=True)


def unguard_positions(model: PreTrainedModel) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _check_length:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _table(module: nn.Module) -> nn.Embedding | None:
    tables = (module._modules.get(name) for name in _TABLES)
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


def _rows(table: nn.Embedding) -> int:
    """Positions that the table holds, without the special rows in front (RoBERTa's padding, the 2 of OPT and BART)."""
    padding = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - (int(getattr(table, "offset", 0)) or padding)


def _check_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    tokens = next((x for name in ("input_ids", "inputs_embeds") if isinstance(x := given.get(name), Tensor)), None)
    table = _table(module)
    if tokens is None or tokens.ndim < 2 or table is None:
        return
    past = given.get("past_key_values_length")
    if past is None:
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
    length = past + tokens.shape[1]
    if length > _rows(table):
        raise ValueError(
            f"the input has {length} tokens, but {type(module).__name__} has learned positions for {_rows(table)}: "
            f"truncate it, or give the dense model more positions first: extend_positions(model, {length})"
        )
