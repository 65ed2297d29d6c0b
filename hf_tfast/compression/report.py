"""What a conversion did: bytes, error and time of every layer that the plan names, and counts of what it touched."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..benchmarking.environment import busy, describe, environment
from ..benchmarking.folder import new_folder
from ..integration._modules import survey
from ..integration._stamps import stamp_of, stamped_modules
from ._batches import Batch
from ._measure import Measured, Span
from .moments import Planned

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Basis", "Before", "Conversion", "Converted", "converted", "saved_bytes"]

COLUMNS = ("layer", "part", "became", "MB before", "MB after", "error", "ms before", "ms after")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One layer that the plan names. `path` is that of the layer down, or of the attention module.

    bytes_*     of its parameters and buffers as they are saved; of a feed-forward those of its linear layers.
    error       ||y' - y|| / ||y|| on the input of the dense model; None where it was not measured.
    seconds_*   of one forward on the measured batch, on this machine; None where not timed.
    """

    part: str
    stack: str
    layer: int
    path: str
    became: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What errors and times rest on. `held_out`: the batch had no part in calibration."""

    rows: int
    tokens: int
    held_out: bool
    rounds: int
    dtype: str
    device: str

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch, held_out: bool, rounds: int) -> "Basis":
        lead = next(x for x in batch.values() if isinstance(x, Tensor) and x.ndim)
        mask = batch.get("attention_mask")
        tokens = int(mask.sum()) if isinstance(mask, Tensor) else lead.shape[:2].numel()
        return cls(
            rows=len(lead), tokens=tokens, held_out=held_out, rounds=rounds,
            dtype=str(model.dtype).removeprefix("torch."), device=str(model.device),
        )  # fmt: skip


class Before:
    """A model before it is converted: its modules and their modes, by path, and what they hold."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = dict(model.named_modules())
        self.types = {path: type(module) for path, module in self.modules.items()}
        self.training = {path: module.training for path, module in self.modules.items()}
        self.sizes = {path: saved_bytes(module) for path, module in self.modules.items()}
        self.attributes = set(vars(model))
        self.stamped = {module for module, _ in stamped_modules(model)}  # by the model's own config
        self.head = model.get_output_embeddings()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """`print` it for a table, `to_dict` it for JSON, `plot` it as PNG, `write` all three into a folder.

    linears            feed-forward linear layers of the dense model by what they are now.
    attention_linears  linear layers of attention that are another module now: none, or conversion has failed.
    head               "kept", or "none" for a model without an output head.
    error, seconds_*   of the whole model; as in Converted.
    """

    model: str
    plan: dict[str, Any]
    linears: dict[str, int]
    attention_linears: int
    head: str
    bytes_before: int
    bytes_after: int
    layers: tuple[Converted, ...]
    error: float | None
    seconds_before: float | None
    seconds_after: float | None
    basis: Basis | None
    environment: dict[str, Any]
    recovery_steps: int = 0

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        before: Before,
        planned: Planned,
        layers: Sequence[Converted],
        whole: Measured,
        basis: Basis | None,
    ) -> "Conversion":
        """ValueError where the output head is no longer what it was, or a linear layer of attention is not."""
        counts: Counter[str] = Counter()
        for block, forms in planned:
            for path in block.paths:
                counts[_now(block.get(path), [form.name for form in forms])] += 1
        attention = [f.path for f in survey(model).found]
        touched = [
            path
            for path, module in before.modules.items()
            if any(path.startswith(f"{above}.") for above in attention)
            and dict(model.named_modules()).get(path) is not module
        ]
        head = model.get_output_embeddings()
        if touched or head is not before.head:
            raise ValueError(f"conversion changed {touched[0] if touched else 'the output head'}, which it must not")
        return cls(
            model=type(model).__name__,
            plan=model.config.quantization_config.to_dict(),  # type: ignore[union-attr]
            linears=dict(counts),
            attention_linears=len(touched),
            head="none" if head is None else "kept",
            bytes_before=before.sizes[""],
            bytes_after=saved_bytes(model),
            layers=tuple(layers),
            error=whole.error,
            seconds_before=whole.seconds_before,
            seconds_after=whole.seconds_after,
            basis=basis,
            environment=environment(),
        )

    @property
    def facts(self) -> str:
        """ "6 feed-forward linears int8, 0 attention, output head kept"."""
        linears = ", ".join(f"{n} feed-forward linears {what}" for what, n in self.linears.items())
        head = "no output head" if self.head == "none" else f"output head {self.head}"
        return f"{linears or '0 feed-forward linears changed'}, {self.attention_linears} attention, {head}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "facts": self.facts}

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a row each layer, the sum of the feed-forwards and the whole model."""
        made = [
            _row(f"{r.stack}.{r.layer}", r.part.replace("_", "-"), r.became, r.bytes_before, r.bytes_after, r)
            for r in self.layers
        ]
        if forwards := [r for r in self.layers if r.part == "feed_forward"]:
            was, now = sum(r.bytes_before for r in forwards), sum(r.bytes_after for r in forwards)
            times = [[getattr(r, name) for r in forwards] for name in ("seconds_before", "seconds_after")]
            summed = Measured(None, *(None if None in column else sum(column) for column in times))
            made.append(_row("all", "feed-forward", "", was, now, summed))
        made.append(_row("model", "whole", "", self.bytes_before, self.bytes_after, self))
        return made

    def table(self) -> "Table":
        from rich.table import Table

        table = Table(title=f"{self.model}: {self.facts}", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, overflow="fold", justify="left" if column in COLUMNS[:3] else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120).print(self.table())
        return text.getvalue() + self.footing() + "\n"

    def footing(self) -> str:
        """What the figures rest on."""
        if self.basis is None:
            return "Without calibration data no error and no time is measured."
        b = self.basis
        which = "a batch that calibration did not see" if b.held_out else "the calibration batch itself"
        fitted = f" Feed-forwards were fitted in {self.recovery_steps} steps each." if self.recovery_steps else ""
        timed = f"medians of {b.rounds} forwards by turns" if b.rounds else "not timed"
        warning = busy(self.environment)
        return (
            f"Error and time on {which}: {b.rows} rows, {b.tokens} tokens, {b.dtype}, {b.device}; {timed}.{fitted} "
            f"{describe(self.environment)}{f'. Note: {warning}' if warning and b.rounds else ''}"
        )

    def markdown(self) -> str:
        lines = [f"# {self.model}", "", f"{self.facts}.", "", "| " + " | ".join(COLUMNS) + " |"]
        lines += ["|" + "|".join("---" if column in COLUMNS[:3] else "---:" for column in COLUMNS) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([*lines, "", self.footing(), ""])

    def plot(self, path: str | Path) -> None:
        """PNG: bytes, error and time of every layer, before and after."""
        from .plot import plot

        plot(self, Path(path))

    def write(self, folder: str | Path) -> Path:
        """Make a folder with report.json, report.md and plot.png; it appears whole or not at all.

        FileExistsError where the folder exists.
        """
        with new_folder(folder, mark="report.json") as working:
            (working / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            (working / "report.md").write_text(self.markdown(), encoding="utf-8")
            self.plot(working / "plot.png")
        return Path(folder)


def converted(model: PreTrainedModel, before: Before, planned: Planned, span: Span, found: Measured) -> Converted:
    """The row of one layer."""
    if span.part == "attention":
        paths: tuple[str, ...] = (span.end,)
        stamp = stamp_of(model.get_submodule(span.end))
        became = short(stamp.mechanism) if stamp is not None else ""
    else:
        block, forms = next((block, forms) for block, forms in planned if block.down == span.end)
        paths, became = block.paths, " + ".join(short(form) for form in forms)
    return Converted(
        part=span.part,
        stack=span.stack,
        layer=span.layer,
        path=span.end,
        became=became,
        bytes_before=sum(before.sizes[path] for path in paths),
        bytes_after=sum(saved_bytes(model.get_submodule(path)) for path in paths),
        **asdict(found),
    )


def short(value: Any) -> str:
    """A form or mechanism with the fields that differ from their defaults: LowRank(ratio=0.5)."""
    given = [f"{f.name}={v!r}" for f in fields(value) if (v := getattr(value, f.name)) != f.default]
    return f"{type(value).__name__}({', '.join(given)})"


def saved_bytes(module: nn.Module) -> int:
    """Bytes of everything that a module saves, tied tensors once."""
    tensors = [x for x in module.state_dict().values() if isinstance(x, Tensor)]
    return sum({(x.data_ptr(), x.shape, x.dtype): x.numel() * x.element_size() for x in tensors}.values())


def _now(module: nn.Module, names: list[str]) -> str:
    """What a linear layer has become: the names of the forms, unless it says integers and holds none."""
    integers = any(isinstance(x, Tensor) and x.dtype == torch.int8 for x in module.state_dict().values())
    return " + ".join(name if name != "int8" or integers else "kept in floating point" for name in names)


def _row(layer: str, part: str, became: str, was: int, now: int, figures: Any) -> tuple[str, ...]:
    error = "-" if figures.error is None else f"{figures.error:.2%}"
    times = [figures.seconds_before, figures.seconds_after]
    ms = ["-" if seconds is None else f"{seconds * 1e3:.3g}" for seconds in times]
    return (layer, part, became, f"{was / 1e6:.3f}", f"{now / 1e6:.3f}", error, *ms)
