"""attention_report: what every attention layer of a model runs, and what that costs against dense attention."""

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention import Mask, Mechanism
from ..attention.dense import Dense
from ._modules import Found, parts_of, survey
from ._stamps import NAME, Ran, last_run, stamp_of
from ._within import within
from .interface import default_mechanism
from .plan import FastPlan

__all__ = ["AttentionReport", "LayerReport", "attention_report"]

_ROWS, _PAIRS = 128, 1 << 26  # above so many pairs, a pattern is counted on this many evenly spaced query rows


@dataclass(frozen=True)
class LayerReport:
    """One attention module.

    implementation  what Transformers asks for: "tfast", or what overrules the plan ("sdpa" was asked for, say).
    mechanism       what it computes, with the model's own sliding window taken in.
    backend         the path that the last forward took; None before the first.
    density         share of the pairs that dense attention computes; None where the content decides.
    flops           multiplications and additions of one forward at the report's length; None as density.
    dense_flops     those of dense attention.
    """

    path: str
    stack: str
    layer: int
    kind: str
    implementation: str
    mechanism: str
    backend: str | None
    density: float | None
    flops: float | None
    dense_flops: float


@dataclass(frozen=True)
class AttentionReport:
    """`print` it for a table, `to_dict` it for JSON. `overruled`: what runs instead of planned layers."""

    model: str
    length: int
    plan: dict[str, Any] | None
    overruled: tuple[str, ...]
    layers: tuple[LayerReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.model}: attention at length {self.length}", title_justify="left")
        for column in ("layer", "kind", "runs", "mechanism", "backend", "density", "GFLOPs", "of dense"):
            table.add_column(column, overflow="fold", justify="right" if column[0] in "dGo" else "left")
        for row in self.layers:
            unknown = "by content"
            table.add_row(
                f"{row.stack}.{row.layer}",
                row.kind,
                row.implementation,
                row.mechanism,
                row.backend or "not yet run",
                unknown if row.density is None else f"{row.density:.2%}",
                unknown if row.flops is None else f"{row.flops / 1e9:.3g}",
                f"{row.dense_flops / 1e9:.3g}",
            )
        text = StringIO()
        Console(file=text, width=120).print(table)
        if self.overruled:
            text.write(f"What was planned does not run: attn_implementation={self.overruled[0]!r} was asked for.\n")
        return text.getvalue()


def attention_report(model: PreTrainedModel, length: int | None = None) -> AttentionReport:
    """What every attention layer runs at `length` tokens; None: that of the last forward, else at most 4096.

    ValueError for anything that is not a Transformers model, and a length below 1.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a Transformers model, got {type(model).__name__}; unwrap it first")
    found = survey(model).found
    if length is None:
        length = max((ran.keys for f in found if (ran := last_run(f.module))), default=0) or _longest(model.config)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    plan = getattr(model.config, "quantization_config", None)
    layers = tuple(_layer(f, model.config, length) for f in found)
    planned = isinstance(plan, FastPlan)
    overruled = sorted({r.implementation for f, r in zip(found, layers, strict=True) if _overruled(f, r)})
    return AttentionReport(
        model=type(model).__name__,
        length=length,
        plan=plan.to_dict() if planned else None,  # type: ignore[union-attr]
        overruled=tuple(overruled),
        layers=layers,
    )


def _overruled(f: Found, row: LayerReport) -> bool:
    stamp = stamp_of(f.module)
    return stamp is not None and not isinstance(stamp.mechanism, Dense) and row.implementation != NAME


def _layer(f: Found, config: PreTrainedConfig, length: int) -> LayerReport:
    own = getattr(f.module, "config", config)
    implementation = own._attn_implementation or "sdpa"
    ran, stamp = last_run(f.module), stamp_of(f.module)
    mechanism: Mechanism = Dense()
    if f.kind == "self" and implementation == NAME and stamp is not None:
        mechanism = stamp.mechanism
    elif f.kind == "self" and implementation.startswith(f"{NAME}_"):
        mechanism = default_mechanism(implementation)
    causal = ran.causal if ran else bool(getattr(f.module, "is_causal", True)) and f.kind == "self"
    mechanism = _with_window(mechanism, f, own, ran, causal, length)
    heads, width = (ran.heads, ran.width) if ran else _sizes(own)
    share = density(mechanism, length, causal, heads)
    dense = 2.0 * heads * width * (length * (length + 1) / 2 if causal else length * length)
    return LayerReport(
        path=f.path,
        stack=f.stack,
        layer=f.layer,
        kind=f.kind,
        implementation=implementation,
        mechanism=repr(mechanism),
        backend=ran.backend if ran and implementation.startswith(NAME) else None,
        density=share,
        flops=None if share is None else share * dense,
        dense_flops=dense,
    )


def _with_window(
    mechanism: Mechanism, f: Found, config: PreTrainedConfig, ran: Ran | None, causal: bool, length: int
) -> Mechanism:
    """The model's own sliding window taken in, where this layer has one."""
    if f.kind == "cross" or (ran and ran.keys >= length):
        return ran.mechanism if ran else mechanism
    window = getattr(f.module, "sliding_window", None)
    if window is None and not hasattr(config, "layer_types"):
        window = getattr(config, "sliding_window", None)
    if not isinstance(window, int):
        return mechanism
    try:
        return within(mechanism, window if causal else window - 1, Mask(causal=causal), length)
    except ValueError:  # the layer will refuse this length; say what was planned
        return mechanism


def density(mechanism: Mechanism, length: int, causal: bool, heads: int) -> float | None:
    """Pairs that a static pattern reads, over the pairs of dense attention; None where the content decides."""
    if isinstance(mechanism, Dense):
        return 1.0
    if type(mechanism).choose is not Mechanism.choose:
        return None
    every = heads * length * length <= _PAIRS
    i = torch.arange(length) if every else torch.linspace(0, length - 1, _ROWS).long()
    j = torch.arange(length)
    read = total = 0
    for rows in i.split(max(1, (1 << 22) // (length * heads))):
        try:
            seen = mechanism.allowed(
                None,
                torch.zeros(1, 1, 1, 1).long(),
                torch.arange(heads).view(-1, 1, 1),
                rows[:, None],
                j,
                causal=causal,
            )
        except NotImplementedError:
            return None
        past = j <= rows[:, None] if causal else torch.ones(len(rows), length, dtype=torch.bool)
        read += int((seen & past).expand(1, heads, -1, -1).sum())
        total += heads * int(past.sum())
    return read / total


def _sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads, and the width of a key plus that of a value, from a config."""
    heads = next((int(n) for name in ("num_attention_heads", "n_head", "decoder_attention_heads", "num_heads")
                  if (n := getattr(config, name, None))), 1)  # fmt: skip
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    return heads, 2 * width


def _longest(config: PreTrainedConfig) -> int:
    sizes = [getattr(part, "max_position_embeddings", None) for _, part in parts_of(config)]
    return min([4096, *(size for size in sizes if isinstance(size, int) and size > 0)])
