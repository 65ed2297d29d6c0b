"""Pictures of one head: the dense attention weights beside the pairs that a mechanism reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import Mask, Mechanism
from .captured import Call, listening, load
from .fidelity import named, weights
from .plot import need_matplotlib
from .recall import pairs

LONGEST = 2048  # tokens: a picture has one pixel a pair at most


def inspect(
    model: str, text: str, mechanism: Mechanism, out: Path, *, layer: int = 0, head: int = 0, stack: str | None = None
) -> dict[str, Any]:
    """Draw head `head` of layer `layer` on `text` into the PNG `out`; returns the figures that stand in it.

    {"tokens", "density", "recall"}: length, share of the pairs read, share of the dense weights that lies on them.
    ValueError for layers, heads and mechanisms that are not there or are no pattern of pairs, and for long texts.
    """
    need_matplotlib()
    if out.exists():
        raise FileExistsError(f"{out} exists; name another file with --out")
    if out.suffix != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    loaded, tokenizer = load(model)
    row = tokenizer(text, return_tensors="pt")["input_ids"]
    if row.shape[1] > LONGEST:
        raise ValueError(f"the text has {row.shape[1]} tokens; a picture takes at most {LONGEST}")
    native = getattr(loaded.config, "max_position_embeddings", None)
    if native is not None and row.shape[1] > native:
        raise ValueError(f"the text has {row.shape[1]} tokens, {model} reads {native}: shorten it")
    calls: list[Call] = []
    with torch.no_grad(), listening(loaded, calls.append):
        loaded(input_ids=row)
    call = _chosen(calls, layer, head, stack)
    dense, seen = maps(call, mechanism, head)
    figures = _figures(call, dense, seen)
    tokens = tokenizer.convert_ids_to_tokens(row[0].tolist())
    title = f"{named(mechanism)}, layer {layer}, head {head}"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(dense, seen, tokens, title, figures, out)
    return figures


def maps(call: Call, mechanism: Mechanism, head: int) -> tuple[Tensor, Tensor]:
    """Dense weights [i j] of one head, and which of the pairs [i j] the mechanism reads."""
    if call.causal and not mechanism.causal:
        raise ValueError(f"{mechanism.name} has no causal form, and this layer is causal")
    every = torch.arange(call.q.shape[2], device=call.q.device)
    mask = Mask(causal=call.causal)
    choice = mechanism.choose(call.q, call.k, mask)
    try:
        seen, before = pairs(mechanism, call.q, call.k, mask, every, choice)
    except NotImplementedError:
        raise ValueError(
            f"{named(mechanism)} is no pattern of pairs: it changes all weights, which `tfast fidelity` measures"
        ) from None
    return weights(call, every, before)[0, head], seen[0, head]


def _figures(call: Call, dense: Tensor, seen: Tensor) -> dict[str, Any]:
    i = len(dense)
    readable = i * (i + 1) // 2 if call.causal else i * i
    return {
        "tokens": i,
        "density": seen.sum().item() / readable,
        "recall": (dense * seen).sum().item() / dense.sum().item(),
    }


def _chosen(calls: Sequence[Call], layer: int, head: int, stack: str | None) -> Call:
    """The call of a layer. ValueError names the layers and heads that there are."""
    stacks = list(dict.fromkeys(call.stack for call in calls))
    if stack is None and len(stacks) == 1:
        stack = stacks[0]
    found = [call for call in calls if call.stack == stack and call.layer == layer]
    if not found:
        there = ", ".join(f"{call.stack}.{call.layer}" for call in calls) or "none without a window of its own"
        raise ValueError(f"no layer {layer} of stack {stack!r}; layers with self-attention: {there}")
    heads = found[0].q.shape[1]
    if not 0 <= head < heads:
        raise ValueError(f"layer {layer} has heads 0 to {heads - 1}, got {head}")
    return found[0]


def draw(dense: Tensor, seen: Tensor, tokens: Sequence[str], title: str, figures: dict[str, Any], path: Path) -> None:
    """Left the dense weights, right the same with the pairs that are not read in grey. Colours are logarithmic."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    values = dense.double().cpu().numpy()
    colours = colormaps["viridis"].with_extremes(bad="0.88", under=colormaps["viridis"](0.0))
    lowest = max(values.max() * 1e-4, 1e-12)
    norm = LogNorm(vmin=lowest, vmax=values.max())
    above = np.where(values > 0, values, lowest)
    if not bool(seen.triu(1).any()) and not values[np.triu_indices(len(values), 1)].any():
        above = np.where(np.tri(len(values), dtype=bool), above, np.nan)  # causal: the future is no pair
    picture = left.imshow(above, norm=norm, cmap=colours, interpolation="nearest")
    right.imshow(np.where(seen.cpu().numpy(), above, np.nan), norm=norm, cmap=colours, interpolation="nearest")
    left.set_title(f"dense weights, {figures['tokens']} tokens", loc="left", fontsize=10)
    right.set_title(
        f"pairs that are read: {figures['density']:.1%} of them, with {figures['recall']:.1%} of the dense weight",
        loc="left", fontsize=10,
    )  # fmt: skip
    for axes in (left, right):
        axes.set(xlabel="key", ylabel="query")
        if len(tokens) <= 64:
            axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6)
            axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
    figure.colorbar(picture, ax=[left, right], shrink=0.85, label="dense attention weight")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=130)
