"""Which modules of a model are its feed-forwards, found by structure: names that belong together, shapes that fit."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..feed_forward import Block
from ._modules import layer_numbers, stack_namer

__all__ = ["feed_forwards"]

# children of one module: layers up (the gate first), layer down
_PATTERNS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama and its kin, TFast
    (("gate_up_proj",), "down_proj"),  # Phi-3, GLM: gate and up in one
    (("up_proj",), "down_proj"),
    (("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    (("ffn",), "ffn_output"),  # ALBERT
    (("lin1",), "lin2"),  # DistilBERT
    (("fc1",), "fc2"),  # BART, OPT, Whisper, CLIP, ViT
    (("c_fc",), "c_proj"),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom, Falcon
    (("wi_0", "wi_1"), "wo"),  # T5 1.1
    (("wi",), "wo"),  # T5
    (("Wi",), "Wo"),  # ModernBERT: gate and up in one
    (("w1", "w3"), "w2"),  # Mistral's own names
)


def feed_forwards(model: PreTrainedModel) -> list[Block]:
    """The feed-forwards of a model, in order, numbered per stack. Reads names and shapes only; works on meta.

    ValueError names what looks like a feed-forward but cannot be one (experts in one tensor, widths that do not fit).
    """
    found: dict[str, list[tuple[str, list[str]]]] = {}  # stack -> (path of the owner, paths of its layers)
    stack_of = stack_namer(model)
    for path, module in model.named_modules():
        if _holds_experts(module):
            raise ValueError(
                f"{path} ({type(module).__name__}) holds all its experts in one tensor: feed-forward forms replace "
                "linear layers, and cannot reach it"
            )
        for ups, down in _PATTERNS:
            if all(_child(module, name) is not None for name in (*ups, down)):
                paths = [f"{path}.{name}" if path else name for name in (*ups, down)]
                found.setdefault(stack_of(path), []).append((path, paths))
                break
    return [
        _block(model, stack, layer, paths)
        for stack, members in found.items()
        for (_, paths), layer in zip(members, layer_numbers([owner for owner, _ in members]), strict=True)
    ]


def _child(module: nn.Module, name: str) -> nn.Module | None:
    found: Any = module
    for part in name.split("."):
        found = found._modules.get(part) if isinstance(found, nn.Module) else None
    return found if isinstance(found, nn.Module) else None


def _holds_experts(module: nn.Module) -> bool:
    held = (module._parameters.get(name) for name in ("gate_up_proj", "up_proj", "down_proj"))
    return any(weight is not None and weight.ndim == 3 for weight in held)


def _block(model: PreTrainedModel, stack: str, layer: int, paths: list[str]) -> Block:
    widths = [_widths(model.get_submodule(path)) for path in paths]
    known = [width for width in widths if width is not None]
    parts = 1
    if len(known) == len(paths):
        inner, outer = known[-1]
        parts = max(1, known[0][1] // inner)
        if parts > 2 or any(up != (outer, inner * parts) for up in known[:-1]):
            shown = ", ".join(f"{path} {i} -> {o}" for path, (i, o) in zip(paths, known, strict=True))
            raise ValueError(f"these layers are named like a feed-forward, and their widths do not fit: {shown}")
    return Block(model=model, stack=stack, layer=layer, ups=tuple(paths[:-1]), down=paths[-1], parts=parts)


def _widths(layer: Any) -> tuple[int, int] | None:
    """(in, out) of a layer; None for one that does not tell."""
    if hasattr(layer, "nf"):  # Conv1D: weight [in out]
        return layer.nx, layer.nf
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return None
