"""Moments of what feed-forward layers read, gathered by hooks over calibration batches, for forms made from data.

Memory   each input of d features keeps a d x d matrix of 8-byte numbers and 4096 rows, for the whole model at once:
         activations of one batch at a time come on top, nothing grows with the data. `moments_bytes` says how much.
What a later form sees
         The inputs are those of the dense feed-forwards under the plan's attention. Pruned takes the neurons it drops
         out of the moments of the layer down, LowRank carries them through its first factor. What a changed layer up
         or a changed layer below does to the inputs is left out: one pass over the data serves every layer.
"""

from collections.abc import Sequence
from typing import Any

import psutil
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..feed_forward import Block, Form, Moments
from ..feed_forward._moments import KEPT
from ._batches import Batch, evaluating, forward, valid_rows

__all__ = ["gather", "moments_bytes"]

Planned = Sequence[tuple[Block, tuple[Form, ...]]]


def wanted(planned: Planned) -> dict[str, Block]:
    """Paths of the layers whose inputs are read by a form. Layers up that read the same input are met once each."""
    return {path: block for block, forms in planned for form in forms for path in form.reads(block)}


def moments_bytes(planned: Planned) -> int:
    """What `gather` will hold. Layers up of one feed-forward read the same input, and share."""
    inputs = {path if path == block.down else block.ups[0]: block.get(path) for path, block in wanted(planned).items()}
    total = 0
    for layer in inputs.values():
        d, weight = _features(layer), next(layer.parameters())
        total += 8 * d * d + KEPT * d * weight.element_size()
    return total


def gather(model: PreTrainedModel, planned: Planned, batches: Sequence[Batch]) -> dict[str, Moments]:
    """Moments of the inputs of every layer that a planned form reads, padding left out; {} where none does.

    The model is in eval mode meanwhile, without gradient, and afterwards as it was. ValueError for inputs that are not
    finite, a layer that no token reaches, and where the memory does not suffice.
    """
    layers = wanted(planned)
    if not layers:
        return {}
    device = next(model.parameters()).device
    if device.type == "cpu" and (need := moments_bytes(planned)) > (free := psutil.virtual_memory().available):
        raise ValueError(
            f"calibration of {len(layers)} layers holds {need / 2**30:.1f} GiB of moments at once, and "
            f"{free / 2**30:.1f} GiB are free: plan fewer layers, forms that need no data (method='svd', limit=...), "
            "or use a machine with more memory"
        )
    listeners = {path: _Listener(model, path, block) for path, block in layers.items()}
    for block in {id(block): block for block in layers.values()}.values():
        ups = [listeners[path] for path in block.ups if path in listeners]
        for other in ups[1:]:
            other.first = ups[0]
    handles: list[RemovableHandle] = []
    try:
        for listener in listeners.values():
            layer = listener.block.get(listener.path)
            handles.append(layer.register_forward_pre_hook(listener))
        with evaluating(model):
            for n, batch in enumerate(batches):
                for listener in listeners.values():
                    listener.batch, listener.number = batch, n
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for path, listener in listeners.items():
        if not listener.moments.count:
            raise ValueError(f"no token of the calibration batches reaches {path}: its form cannot be made from them")
    return {path: listener.moments for path, listener in listeners.items()}


class _Listener:
    """Forward pre-hook of one layer. `first` reads the same input, where that is so: its moments are shared."""

    def __init__(self, model: PreTrainedModel, path: str, block: Block) -> None:
        self.model, self.path, self.block = model, path, block
        self.batch: Batch = {}
        self.number = 0
        self.own = Moments()
        self.first: _Listener | None = None
        self.last: Tensor | None = None

    @property
    def moments(self) -> Moments:
        return self.own if self.first is None else self.first.moments

    def __call__(self, layer: Any, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if self.first is not None:
            if x is self.first.last:
                return
            raise ValueError(f"{self.path} reads another input than {self.first.path}: not a plain feed-forward")
        self.last = x if self.path != self.block.down else None
        try:
            self.own.add(valid_rows(self.model, self.batch, self.block.stack, x.detach(), self.path))
        except ValueError as error:
            raise ValueError(f"calibration batch {self.number}, at {self.path}: {error}") from None


def _features(layer: Any) -> int:
    return layer.nx if hasattr(layer, "nx") else layer.in_features
