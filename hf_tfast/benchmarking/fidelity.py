"""How near mechanisms come to dense attention, measured on the layers of a real model over real text.

For every layer, on the queries, keys and values that the dense model makes of a document:

    error     |o - dense| / |dense|, Frobenius norms over heads and positions
    cosine    of output vectors of single heads with the dense ones, mean
    recall    patterns only: share of the dense weights that lies on allowed pairs, mean over queries
    density   patterns only: allowed pairs over the pairs that dense attention reads

Layers see dense inputs, so errors of one layer do not add to those of the next.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..attention import Mask, Mechanism, mechanism_from_dict
from .bench import parse_field
from .budgets import FIDELITY as BUDGETS
from .budgets import TURNED, standard
from .captured import Call, listening, load
from .environment import describe, environment
from .folder import check_new, fresh_name, new_folder
from .plot import COLOURS, need_matplotlib

MARK = "results.jsonl"
EXACT = 1e-4  # errors below come from rounding in fp32
QUERIES = 256  # evenly spaced queries whose whole rows of weights are looked at


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: `texts` are documents, each cut to `length` tokens. `out` None: a new folder in runs/."""

    model: str
    name: str
    texts: Sequence[str]
    corpus: str
    who: Sequence[Mechanism] = ()
    length: int = 4096
    documents: int = 4
    out: Path | None = None
    overwrite: bool = False
    plots: bool = True


def fidelity(request: Request, report: Callable[[str], None]) -> tuple[Path, list[dict[str, Any]]]:
    """Measure, write results.jsonl, table.md and error.png to a new folder; returns it and the records."""
    if request.plots:
        need_matplotlib()
    target = request.out or fresh_name("fidelity")
    check_new(target, request.overwrite, MARK)
    if request.length < 2 or request.documents < 1:
        raise ValueError(f"expected length >= 2 and documents >= 1, got {request.length} and {request.documents}")
    who = list(request.who) or standard()
    model, tokenizer = load(request.model, request.length)
    rows = _rows(request, tokenizer)
    machine = {"kind": "environment", **environment()}
    sizes = [row.shape[1] for row in rows]
    about = {"kind": "input", "model": request.name, "corpus": request.corpus, "tokens": sizes}
    measured: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    refused: dict[str, str] = {}

    def listen(call: Call) -> None:
        for n, mechanism in enumerate(who):
            if call.causal and not mechanism.causal:
                refused[named(mechanism)] = "no causal form"
                continue
            measured.setdefault((n, call.stack, call.layer), []).append(compare(call, mechanism))
        report(f"document {done + 1} of {len(rows)}, {call.stack} layer {call.layer}")

    with torch.no_grad(), listening(model, listen):
        for done, row in enumerate(rows):  # noqa: B007 read by `listen`
            model(input_ids=row)
    records = [machine, about]
    for (n, stack, layer), found in sorted(measured.items(), key=lambda item: item[0]):
        records.append({"kind": "fidelity", "label": named(who[n]), **who[n].to_dict(), "stack": stack, "layer": layer,
                        **_mean(found)})  # fmt: skip
    records += [{"kind": "skipped", "label": name, "why": why} for name, why in refused.items()]
    with new_folder(target, overwrite=request.overwrite, mark=MARK) as folder:
        (folder / MARK).write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "table.md").write_text(markdown(records))
        if request.plots:
            plot(records, folder / "error.png")
    return target, records


def _rows(request: Request, tokenizer: Any) -> list[Tensor]:
    """Token ids [1 i] of the longest documents, cut to `length`."""
    cut = {"truncation": True, "max_length": request.length, "return_tensors": "pt"}
    rows = [tokenizer(text, **cut)["input_ids"] for text in request.texts if text.strip()]
    rows = sorted((row for row in rows if row.shape[1] > 1), key=lambda row: -row.shape[1])[: request.documents]
    if not rows:
        raise ValueError(f"{request.corpus} holds no text of two tokens or more")
    return rows


def compare(call: Call, mechanism: Mechanism) -> dict[str, float | None]:
    """The figures of one mechanism on one layer and document."""
    mask = Mask(causal=call.causal)
    choice = mechanism.choose(call.q, call.k, mask)
    o = mechanism.fast(call.q, call.k, call.v, mask, call.score, choice=choice)
    error = ((o - call.o).norm() / call.o.norm()).item()
    cosine = F.cosine_similarity(o, call.o, dim=-1).mean().item()
    recall = density = None
    i = call.q.shape[2]
    few = torch.linspace(0, i - 1, min(QUERIES, i), device=call.q.device).round().long()
    try:
        seen, before = pairs(call, mechanism, choice, few)
    except NotImplementedError:  # not a pattern of pairs
        pass
    else:
        recall = (weights(call, few, before) * seen).sum(-1).mean().item()
        density = (seen.sum() / before.expand_as(seen).sum()).item()
    return {"error": error, "cosine": cosine, "recall": recall, "density": density}


def pairs(call: Call, mechanism: Mechanism, choice: Any, few: Tensor) -> tuple[Tensor, Tensor]:
    """For the queries `few`: the pairs [b h n j] that the mechanism reads, and those [n j] of dense attention."""
    (b, h, i, _), device = call.q.shape, call.q.device
    at = torch.arange(i, device=device)
    before = at <= few[:, None] if call.causal else torch.ones(len(few), i, dtype=torch.bool, device=device)
    rows = torch.arange(b, device=device).view(-1, 1, 1, 1)
    heads = torch.arange(h, device=device).view(-1, 1, 1)
    seen = mechanism.allowed(choice, rows, heads, few[:, None], at, causal=call.causal) & before
    return seen.expand(b, h, -1, -1), before


def weights(call: Call, few: Tensor, before: Tensor) -> Tensor:
    """Dense attention weights [b h n j] of the queries `few`; with learned sinks they add up to less than 1."""
    (b, h, _, d), (g, j) = call.q.shape, call.k.shape[1:3]
    s = call.q[:, :, few].reshape(b, g, -1, d) @ call.k.mT
    s = call.score.cap(s.view(b, h, len(few), j) * call.score.factor(d)).masked_fill(~before, float("-inf"))
    if call.score.sinks is None:
        return s.softmax(-1)
    sinks = call.score.sinks.to(s).view(1, h, 1, 1).expand(b, h, len(few), 1)
    return torch.cat([s, sinks], -1).softmax(-1)[..., :j]


def _mean(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over documents."""
    means = {name: None if found[0][name] is None else sum(f[name] for f in found) / len(found) for name in found[0]}
    return {**means, "documents": len(found)}


@dataclass(frozen=True)
class Summary:
    """One mechanism at one budget over all layers."""

    mechanism: str
    label: str
    error: float
    worst: float
    cosine: float
    recall: float | None
    density: float | None


def summaries(records: Sequence[dict[str, Any]]) -> list[Summary]:
    """Means over layers, in the order of the records; `worst` is the largest error of a layer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "fidelity":
            groups.setdefault(record["label"], []).append(record)
    found = []
    for name, same in groups.items():
        mean = _mean([{key: r[key] for key in ("error", "cosine", "recall", "density")} for r in same])
        del mean["documents"]
        found.append(Summary(same[0]["mechanism"], name, worst=max(r["error"] for r in same), **mean))
    return found


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table, with what it was measured on."""
    machine = next(r for r in records if r["kind"] == "environment")
    about = next(r for r in records if r["kind"] == "input")
    rows = [
        "| mechanism | density | recall of attention mass | relative error, mean of layers | worst layer | cosine |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    share = lambda x: "-" if x is None else f"{x:.1%}"  # noqa: E731
    for s in summaries(records):
        cells = (f"`{s.label}`", share(s.density), share(s.recall), f"{s.error:.3g}", f"{s.worst:.3g}")
        rows.append(f"| {' | '.join(cells)} | {s.cosine:.4f} |")
    rows += [f"| `{r['label']}` | skipped: {r['why']} | | | | |" for r in records if r["kind"] == "skipped"]
    layers = len({(r["stack"], r["layer"]) for r in records if r["kind"] == "fidelity"})
    tokens = ", ".join(map(str, about["tokens"]))
    return (
        "\n".join(rows) + f"\n\nModel: {about['model']}, {layers} layers, dense inputs to each, fp32. "
        f"Text: {about['corpus']}, documents of {tokens} tokens.\n\n"
        f"Machine: {describe(machine)}\n\nMade by: `{machine['command']}`\n"
    )


def _without_budget(s: Summary) -> str:
    """The label without the field that is turned for more or fewer pairs: what one line of the plot has in common."""
    field = TURNED.get(s.mechanism)
    return s.label if field is None else re.sub(rf"(?<=[(\s]){field}=[^,)]*(, )?", "", s.label).replace(", )", ")")


def _short(label: str) -> str:
    return label if len(label) <= 52 else f"{label[:49]}..."


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: error over density for patterns, a line a mechanism. Right: the others, a point a budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = summaries(records)
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(dict.fromkeys(s.mechanism for s in found))}
    sparse = [s for s in found if s.density is not None]
    other = sorted((s for s in found if s.density is None), key=lambda s: (s.mechanism, -s.error))
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharey=False)
    lines: dict[str, list[Summary]] = {}
    for s in sparse:
        lines.setdefault(_without_budget(s), []).append(s)
    styles = {name: iter(("-", "--", ":", "-.")) for name in colour}
    for name, same in lines.items():
        points = sorted((s.density or 0.0, s.error) for s in same)
        style = {"linestyle": next(styles[same[0].mechanism], "-"), "color": colour[same[0].mechanism]}
        left.plot(*zip(*points, strict=True), marker="o", label=_short(name), markersize=4, linewidth=1.6, **style)
    if inexact := [s.error for s in sparse if s.error > EXACT]:
        left.set_ylim(min(inexact) / 2, max(inexact) * 1.5)  # points of the full budget lie far below
    left.set(xscale="log", yscale="log", xlabel="density: share of the pairs read", ylabel="relative error")
    left.set_title("patterns of pairs", loc="left", fontsize=10)
    if sparse:
        left.legend(frameon=False, fontsize=8)
    right.scatter([s.error for s in other], range(len(other)), color=[colour[s.mechanism] for s in other], s=26)
    right.set_yticks(range(len(other)), [_short(s.label) for s in other], fontsize=8)
    right.set(xscale="log", xlabel="relative error")
    right.set_title("approximations of all pairs", loc="left", fontsize=10)
    for axes in (left, right):
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    about = next(r for r in records if r["kind"] == "input")
    figure.suptitle(
        f"attention outputs against dense, mean over layers: {about['model']}, {max(about['tokens'])} tokens",
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=130)


BEGIN, END = "<!-- fidelity: made by `tfast fidelity --update` -->", "<!-- end of fidelity -->"


def renew(page: Path, table: str) -> None:
    """Put the table between the markers of a Markdown page. ValueError where they are missing."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page}: expected one line {BEGIN!r} and after it one line {END!r}")
    page.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{table}\n{END}{text.split(END)[1]}", encoding="utf-8")


def parse(said: Sequence[str]) -> list[Mechanism]:
    """Mechanisms of the command line: "window" over its budgets, or with fields, "window:window=64,sinks=4"."""
    found: list[Mechanism] = []
    for text in said:
        name, colon, own = text.partition(":")
        budgets = [dict(parse_field(part) for part in own.split(",") if part)] if colon else BUDGETS.get(name) or [{}]
        found += [mechanism_from_dict({"mechanism": name, **given}) for given in budgets]
    return found


def named(mechanism: Mechanism) -> str:
    """Class and the fields that say something: those that every one of BUDGETS sets, and others off their default."""
    turned = set.intersection(*map(set, BUDGETS.get(mechanism.name) or [{}]))
    said = [
        f"{f.name}={getattr(mechanism, f.name)!r}"
        for f in fields(mechanism)  # type: ignore[arg-type]
        if f.name in turned or getattr(mechanism, f.name) != f.default
    ]
    return f"{type(mechanism).__name__}({', '.join(said)})"
