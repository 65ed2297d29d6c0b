"""How near mechanisms come to dense attention, measured on the layers of a real model over real text.

For every layer, on the queries, keys and values that the dense model makes of a document:

    error     |o - dense| / |dense|, Frobenius norms over heads and positions
    cosine    of output vectors of single heads with the dense ones, mean
    recall    patterns only: share of the dense weights that lies on allowed pairs, mean over queries
    density   patterns only: allowed pairs over the pairs that dense attention reads
    far       patterns only: share of the dense weights that lies outside a window of the same density,
    found     and the share of that which the pattern reads: 0 for a window, about the density for random pairs

Layers see dense inputs, so errors of one layer do not add to those of the next. The same is measured on a made-up
pattern, in which every query looks for one key that may be anywhere. What is measured is kept layer by layer beside
the result folder until all of it is there, so that an interrupted run can be continued.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..attention import Mask, Mechanism, Score, mechanism_from_dict
from .bench import parse_field
from .budgets import FIDELITY, fidelity_budgets, standard
from .captured import Call, listening, load
from .environment import environment
from .fidelity_pages import FIGURES, draw, markdown, mean, summaries
from .folder import check_new, fresh_name, new_folder
from .ledger import Ledger, begin, resume
from .plot import need_matplotlib
from .recall import evenly, pairs

__all__ = ["Request", "compare", "fidelity", "markdown", "named", "parse", "retrieval", "standard", "summaries"]

MARK = "results.jsonl"
QUERIES = 256  # evenly spaced queries whose whole rows of weights are looked at


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: `texts` are documents, each cut to `length` tokens. `out` None: a new folder in runs/.

    resume, minutes   go on with an interrupted run; end it after so many minutes, with a TimeoutError that says how to
                      go on.
    """

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
    resume: bool = False
    minutes: float | None = None


def fidelity(request: Request, report: Callable[[str], None]) -> tuple[Path, list[dict[str, Any]]]:
    """Measure, write results.jsonl, table.md and plots to a new folder; returns it and the records."""
    if request.plots:
        need_matplotlib()
    if request.resume and request.out is None:
        raise ValueError("resume goes on with a run by the name of its folder: give it as out")
    target = request.out or fresh_name("fidelity")
    check_new(target, request.overwrite, MARK)
    if request.length < 2 or request.documents < 1:
        raise ValueError(f"expected length >= 2 and documents >= 1, got {request.length} and {request.documents}")
    who = list(request.who) or standard(request.length)
    model, tokenizer = load(request.model, request.length)
    rows = _rows(request, tokenizer)
    ledger = _ledger(request, target, [row.shape[1] for row in rows])
    ledger.add([{"kind": "environment", **environment()}])
    refused = _measure(request, who, rows, model, ledger, report)
    records = [*ledger.of("environment"), *ledger.of("input"), *_folded(ledger, who)]
    records += [{"kind": "skipped", "label": name, "why": why} for name, why in refused.items()]
    with new_folder(target, overwrite=request.overwrite, mark=MARK) as folder:
        (folder / MARK).write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "table.md").write_text(markdown(records))
        if request.plots:
            draw(records, folder)
    shutil.rmtree(ledger.folder)
    return target, records


def _ledger(request: Request, target: Path, tokens: list[int]) -> Ledger:
    """What is kept on the way, in a folder beside the target."""
    partial = target.with_name(f".{target.name}.part")
    about = {"suite": "fidelity", "model": request.name, "corpus": request.corpus, "tokens": tokens}
    if request.resume and (partial / MARK).exists():
        return resume(partial, about)
    if partial.exists() and request.overwrite:
        shutil.rmtree(partial)
    ledger = begin(partial, about)
    ledger.add([{"kind": "input", "model": request.name, "corpus": request.corpus, "tokens": tokens}])
    return ledger


def _measure(
    request: Request, who: Sequence[Mechanism], rows: Sequence[Tensor], model: Any, ledger: Ledger,
    report: Callable[[str], None],
) -> dict[str, str]:  # fmt: skip
    """Add to the ledger what it lacks; returns what was refused, and why."""
    refused: dict[str, str] = {}
    known = {(r["document"], r["stack"], r["layer"], r["label"]) for r in ledger.of("part")}
    began = time.monotonic()

    def note(call: Call, document: int | None) -> None:
        if request.minutes is not None and time.monotonic() - began > 60 * request.minutes:
            raise TimeoutError(f"{request.minutes:g} minutes are over; go on with --resume --out {request.out}")
        place, found = {"document": document, "stack": call.stack, "layer": call.layer}, []
        for mechanism in who:
            label = named(mechanism)
            if call.causal and not mechanism.causal:
                refused[label] = "no causal form"
            elif (*place.values(), label) not in known:
                found.append({"kind": "part", **place, "label": label, **compare(call, mechanism)})
        ledger.add(found)

    with torch.no_grad():
        note(retrieval(request.length), None)
        for number, row in enumerate(rows):

            def listen(call: Call, number: int = number) -> None:
                report(f"document {number + 1} of {len(rows)}, {call.stack} layer {call.layer}")
                note(call, number)

            with listening(model, listen):
                model(input_ids=row)
    return refused


def _folded(ledger: Ledger, who: Sequence[Mechanism]) -> list[dict[str, Any]]:
    """One record a mechanism and layer, means over documents; those of the made-up pattern are of kind "made up"."""
    places: dict[tuple[int, bool, str, int], list[dict[str, Any]]] = {}
    order = {named(mechanism): n for n, mechanism in enumerate(who)}
    for r in ledger.of("part"):
        if r["label"] in order:
            key = (order[r["label"]], r["document"] is None, r["stack"], r["layer"])
            places.setdefault(key, []).append(r)
    return [
        {"kind": "made up" if made_up else "fidelity", "label": named(who[n]), **who[n].to_dict(), "stack": stack,
         "layer": layer, **mean(found), "documents": len(found)}
        for (n, made_up, stack, layer), found in sorted(places.items(), key=lambda item: item[0])
    ]  # fmt: skip


def _rows(request: Request, tokenizer: Any) -> list[Tensor]:
    """Token ids [1 i] of the longest documents, cut to `length`."""
    cut = {"truncation": True, "max_length": request.length, "return_tensors": "pt"}
    rows = [tokenizer(text, **cut)["input_ids"] for text in request.texts if text.strip()]
    rows = sorted((row for row in rows if row.shape[1] > 1), key=lambda row: -row.shape[1])[: request.documents]
    if not rows:
        raise ValueError(f"{request.corpus} holds no text of two tokens or more")
    return rows


def retrieval(length: int, heads: int = 8, width: int = 64) -> Call:
    """Made-up attention in which every query looks for one key, anywhere in the row, and has most of its weight there.
    Queries have a cosine of 0.8 with the key they look for and are random otherwise."""
    generator = torch.Generator().manual_seed(0)
    k, v, own = (torch.randn(1, heads, length, width, generator=generator) for _ in range(3))
    sought = torch.randint(length, (1, heads, length, 1), generator=generator)
    q = 2 * (0.8 * k.gather(2, sought.expand_as(k)) + 0.6 * own)
    return Call("made up", 0, q, k, v, F.scaled_dot_product_attention(q, k, v), False, Score())


def compare(call: Call, mechanism: Mechanism) -> dict[str, float | None]:
    """The figures of one mechanism on one layer and document."""
    mask = Mask(causal=call.causal)
    choice = mechanism.choose(call.q, call.k, mask)
    o = mechanism.fast(call.q, call.k, call.v, mask, call.score, choice=choice)
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    figures["error"] = ((o - call.o).norm() / call.o.norm()).item()
    figures["cosine"] = F.cosine_similarity(o, call.o, dim=-1).mean().item()
    few = evenly(call.q.shape[2], QUERIES)
    try:
        seen, before = pairs(mechanism, call.q, call.k, mask, few, choice)
    except NotImplementedError:  # not a pattern of pairs
        return figures
    dense = weights(call, few, before)
    outside = ~window_of(seen, before, few)
    mass = (dense * outside).sum(-1).mean().item()
    figures["recall"] = (dense * seen).sum(-1).mean().item()
    figures["density"] = (seen.sum() / before.expand_as(seen).sum()).item()
    figures["far"] = mass
    figures["found"] = (dense * (seen & outside)).sum(-1).mean().item() / mass if mass > 0 else None
    return figures


def window_of(seen: Tensor, before: Tensor, few: Tensor) -> Tensor:
    """[n j]: the pairs of the narrowest window around the queries `few` that reads at least as many pairs of `before`
    [n j] as `seen` [b h n j] reads on average."""
    distance = (torch.arange(before.shape[1]) - few[:, None]).abs()
    wanted = round(seen.sum().item() / seen[..., 0, 0].numel())
    if not wanted:
        return torch.zeros_like(before)
    reach = distance[before].kthvalue(wanted).values
    return before & (distance <= reach)


def weights(call: Call, few: Tensor, before: Tensor) -> Tensor:
    """Dense attention weights [b h n j] of the queries `few`; with learned sinks they add up to less than 1."""
    (b, h, _, d), (g, j) = call.q.shape, call.k.shape[1:3]
    s = call.q[:, :, few].reshape(b, g, -1, d) @ call.k.mT
    s = call.score.cap(s.view(b, h, len(few), j) * call.score.factor(d)).masked_fill(~before, float("-inf"))
    if call.score.sinks is None:
        return s.softmax(-1)
    sinks = call.score.sinks.to(s).view(1, h, 1, 1).expand(b, h, len(few), 1)
    return torch.cat([s, sinks], -1).softmax(-1)[..., :j]


def parse(said: Sequence[str], length: int) -> list[Mechanism]:
    """Mechanisms of the command line: "window" over its budgets, or with fields, "window:window=64,sinks=4"."""
    found: list[Mechanism] = []
    for text in said:
        name, colon, own = text.partition(":")
        given = (
            [dict(parse_field(part) for part in own.split(",") if part)] if colon else fidelity_budgets(name, length)
        )
        found += [mechanism_from_dict({"mechanism": name, **budget}) for budget in given]
    return found


def named(mechanism: Mechanism) -> str:
    """Class and the fields that say something: those that every one of FIDELITY sets, and others off their default."""
    budgets = FIDELITY.get(mechanism.name) or [{}]
    turned = set.intersection(*map(set, budgets))
    said = [
        f"{f.name}={_short(getattr(mechanism, f.name))}"
        for f in fields(mechanism)  # type: ignore[arg-type]
        if f.name in turned or getattr(mechanism, f.name) != f.default
    ]
    return f"{type(mechanism).__name__}({', '.join(said)})"


def _short(value: Any) -> str:
    return f"<{len(value)} lists>" if isinstance(value, tuple) else repr(value)
