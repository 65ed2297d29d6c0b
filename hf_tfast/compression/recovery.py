"""Few-step recovery: every converted feed-forward is fitted to what the dense one makes of calibration data.

    minimise |f(x) - y|^2 / |y|^2 over the weights of f by Adam,   x, y: input and output of the dense feed-forward

Order    each layer by itself, on the inputs that the dense model gives it: once its forms are made, before Int8 stores
         what was found. No gradient goes through the model, and no layer waits for another.
Kept     the state of least error on rows that are not fitted to, the start among them: none gets worse there.
Memory   at most ROWS inputs and outputs of every planned feed-forward, in fp32; the fit adds Adam's moments of one.
Fitted   all weights of the layers, those up that Pruned has only cut too; of Activation alone, which is lossless, its
         levels.
Source   block by block against the dense outputs: Shin et al., "Rethinking Pruning Large Language Models", section 3,
         https://arxiv.org/abs/2406.15524
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..feed_forward import Block, Form
from ..feed_forward._base import STORES
from ..feed_forward._fused import _NAMES as ACTIVATIONS
from ..feed_forward.activation import ActivationQuantized
from ._batches import Batch, forward, valid_rows
from .moments import Planned

__all__ = ["Recovery"]

ROWS = 16384  # inputs kept of a layer
BATCH = 512  # of them in a step
ASIDE = 8  # one row in so many is not fitted to
RATE = 0.01  # of Adam, as a share of the size of each weight matrix; it falls to 0 as a cosine


@dataclass
class _Rows:
    """Inputs x [n d] and outputs y [n d] of one dense feed-forward, fp32, and the function between its layers."""

    x: Tensor
    y: Tensor
    act: Callable[[Tensor], Tensor]


class Recovery:
    """Reads what dense feed-forwards do, then fits what has taken their place: `fit` after the forms are made."""

    def __init__(self, model: PreTrainedModel, planned: Planned, batches: Sequence[Batch], steps: int) -> None:
        """ValueError for a plan in which nothing can be fitted, and for feed-forwards of unknown structure."""
        self.steps = steps
        self.errors: dict[str, tuple[float, float]] = {}  # path of the layer down -> error before, after
        fitted = [block for block, forms in planned if any(form.order < STORES for form in forms)]
        if not fitted:
            raise ValueError(
                "recovery_steps fits the weights that forms leave, and this plan leaves none: it needs Pruned, "
                "LowRank, TensorTrain or Activation"
            )
        self.rows = _read(model, fitted, batches)

    def fit(self, block: Block, forms: Sequence[Form]) -> None:
        """Fit the layers at the block's paths, in place, in their own dtype."""
        rows = self.rows.pop(block.down, None)
        weights = _fitted(block, forms)
        if rows is None or not weights:
            return
        layers = [w for path in block.paths for w in block.get(path).parameters() if w.is_floating_point()]
        dtypes, asked = [w.dtype for w in layers], [w.requires_grad for w in layers]
        try:
            for w in layers:  # those that are not fitted too: one dtype throughout
                w.data = w.data.float()
            with torch.enable_grad():
                self.errors[block.down] = _descend(block, rows, weights, self.steps)
        finally:
            for w, dtype, wanted in zip(layers, dtypes, asked, strict=True):
                w.data = w.data.to(dtype)
                w.requires_grad_(wanted)
                w.grad = None


def _fitted(block: Block, forms: Sequence[Form]) -> list[nn.Parameter]:
    """What is fitted. A form that promises to give the dense weights back must find them as they were."""
    modules: list[nn.Module] = [block.get(path) for path in block.paths]
    made = [form for form in forms if form.order < STORES]
    if all(form.lossless for form in made):
        modules = [m.levels for each in modules for m in each.modules() if isinstance(m, ActivationQuantized)]
    return [w for module in modules for w in module.parameters() if w.is_floating_point()]


def _descend(block: Block, rows: _Rows, weights: list[nn.Parameter], steps: int) -> tuple[float, float]:
    """Adam on `weights`, which keep the best state seen: its error before and after on the rows put aside."""
    aside = torch.arange(len(rows.x), device=rows.x.device) % ASIDE == ASIDE - 1
    x, y, held_x, held_y = rows.x[~aside], rows.y[~aside], rows.x[aside], rows.y[aside]
    size = (y.square().mean()).clamp(min=torch.finfo(y.dtype).tiny)
    for w in weights:
        w.requires_grad_(True)
    groups = [{"params": [w], "lr": RATE * float(w.detach().square().mean().sqrt()) or RATE} for w in weights]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    draws = torch.Generator().manual_seed(0)

    def held() -> float:
        with torch.no_grad():
            left = sum(
                float((_run(block, rows.act, a) - b).square().sum())
                for a, b in zip(held_x.split(BATCH), held_y.split(BATCH), strict=True)
            )
        return math.sqrt(left / max(float(held_y.square().sum()), torch.finfo(y.dtype).tiny))

    start = best = held()
    kept = [w.detach().clone() for w in weights]
    for step in range(steps):
        some = torch.randint(len(x), (min(BATCH, len(x)),), generator=draws).to(x.device)
        loss = (_run(block, rows.act, x[some]) - y[some]).square().mean() / size
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step + 1 == steps or (step + 1) % max(1, steps // 8) == 0:
            now = held()
            if now < best:
                best, kept = now, [w.detach().clone() for w in weights]
    for w, state in zip(weights, kept, strict=True):
        w.data.copy_(state)
    return start, best


def _run(block: Block, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """down(act(up(x))), or down(act(gate(x)) * up(x)), with what is at the block's paths now."""
    ups = [block.get(path)(x) for path in block.ups]
    if block.parts == 2:
        ups = list(ups[0].chunk(2, -1))
    inner = act(ups[0])
    for up in ups[1:]:
        inner = inner * up
    y: Tensor = block.get(block.down)(inner)
    return y


def _read(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]) -> dict[str, _Rows]:
    """Rows of every block, evenly over the batches, by the path of its layer down."""
    lead = [next(x for x in b.values() if isinstance(x, Tensor) and x.ndim > 1) for b in batches]
    every = max(1, -(-sum(x.shape[:2].numel() for x in lead) // ROWS))
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {block.down: ([], []) for block in blocks}
    current: list[Batch] = []
    handles = []

    def keep(block: Block, which: int, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            rows = valid_rows(model, current[-1], block.stack, (args[0] if which == 0 else output).detach(), path)
            kept[block.down][which].append(rows[::every].float())

        return hook

    try:
        for block in blocks:
            first = block.ups[0]
            handles.append(block.get(first).register_forward_pre_hook(keep(block, 0, first)))
            handles.append(block.get(block.down).register_forward_hook(keep(block, 1, block.down)))
        for batch in batches:
            current.append(batch)
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for block in blocks:
        x, y = (torch.cat(part) if part else torch.empty(0) for part in kept[block.down])
        if len(x) < 2 * ASIDE:
            raise ValueError(f"{block.down} has read {len(x)} tokens of calibration data: too few for recovery")
        found[block.down] = _Rows(x, y, _activation(block, x, y))
    return found


def _activation(block: Block, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The function between the dense layers: that of their owner with which they give y of x. ValueError if none."""
    owner = block.model.get_submodule(block.ups[0].rpartition(".")[0])
    dtype = next(block.get(block.down).parameters()).dtype
    few, wanted = x[:64].to(dtype), y[:64].double()
    for name in ACTIVATIONS:
        act = getattr(owner, name, None)
        if callable(act):
            found = _run(block, act, few).double()
            if found.shape == wanted.shape and float((found - wanted).norm()) <= 0.02 * float(wanted.norm()):
                return act  # type: ignore[no-any-return]
    raise ValueError(
        f"recovery does not know what {type(owner).__name__} computes between {block.ups[0]} and {block.down}: "
        "leave recovery_steps out"
    )
