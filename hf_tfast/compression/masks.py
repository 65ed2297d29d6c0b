"""Masks: single weights of feed-forward layers held at zero, through torch.nn.utils.prune.

A mask saves nothing by itself: a zero takes the room and the time of any other number, and while a mask is on there
are two tensors for one. It is a means to study and to train with; what makes a model smaller and faster is Pruned,
which takes whole neurons out.

    mask(model, ratio=0.5)          # half of the weights of each layer stay
    ...                             # train: zeros stay zeros
    make_permanent(model)           # plain layers with zeros in them again, as a checkpoint has them

magnitude   keeps the largest weights of each layer (Han et al., https://arxiv.org/abs/1506.02626)
random      keeps a seeded choice, the baseline
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from transformers import PreTrainedModel

from ..feed_forward._base import check_finite, weight_of
from ..integration._feed_forwards import feed_forwards
from ..integration.apply import check_whole

__all__ = ["make_permanent", "mask", "masked"]

METHODS = ("magnitude", "random")


def mask(model: PreTrainedModel, ratio: float, method: str = "magnitude", seed: int = 0) -> PreTrainedModel:
    """Hold single weights of every feed-forward layer at zero, in place, and return the model.

    ratio   share of the weights of each layer that stay, above 0 and up to 1.

    While masks are on, `state_dict` and `save_pretrained` raise: the checkpoint would hold `weight_orig` and
    `weight_mask`, which no model reads. ValueError, with nothing changed, for another ratio or method, a model that
    has masks or no feed-forwards, is sharded or offloaded, and layers that are not plain linear ones (named).
    """
    if isinstance(ratio, bool) or not isinstance(ratio, float | int) or not 0 < ratio <= 1:
        raise ValueError(f"ratio is the share of weights that stay, above 0 and up to 1, got {ratio!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if present := masked(model):
        raise ValueError(f"{present[0]} has a mask already: call make_permanent(model) first")
    check_whole(model)
    layers = {path: block.get(path) for block in feed_forwards(model) for path in block.paths}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no feed-forward that is known by its structure")
    for path, layer in layers.items():
        check_finite(weight_of(layer, path), path)
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        for layer in layers.values():
            if method == "random":
                prune.random_unstructured(layer, "weight", amount=1.0 - float(ratio))
            else:
                prune.l1_unstructured(layer, "weight", amount=1.0 - float(ratio))
            layer.register_state_dict_pre_hook(_refuse)
    return model


def make_permanent(model: PreTrainedModel) -> PreTrainedModel:
    """Turn masked layers into plain ones whose masked weights are zeros, in place, and return the model.

    ValueError for a model without masks.
    """
    paths = masked(model)
    if not paths:
        raise ValueError(f"this {type(model).__name__} has no masks")
    for path in paths:
        layer = model.get_submodule(path)
        prune.remove(layer, "weight")
        for key, hook in list(layer._state_dict_pre_hooks.items()):
            if hook is _refuse:
                del layer._state_dict_pre_hooks[key]
    return model


def masked(model: nn.Module) -> list[str]:
    """Paths of the layers with a mask."""
    return [path for path, module in model.named_modules() if "weight_mask" in module._buffers]


def _refuse(module: nn.Module, prefix: str, keep_vars: Any) -> None:
    raise ValueError(
        f"{prefix.rstrip('.') or 'this layer'} has a mask, and a checkpoint of weight_orig and weight_mask can be "
        "read by no model: call hf_tfast.compression.make_permanent(model) before saving"
    )
