"""Model cards: what a model runs, what was measured of it, and how it is loaded so that it really runs that.

    card = model_card(model, "user/fast", license="apache-2.0", base_model="user/dense", results=["runs/fidelity-1"])
    card.save("folder/README.md")

Figures come from the files that the measuring commands write, each with its machine and command; nothing else is said.
"""

import inspect
import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..attention import mechanism_from_dict
from ..attention.dense import Dense
from ..benchmarking import catalogue
from ..integration.plan import FastPlan
from ..integration.report import LayerReport, attention_report
from .measured import Facts, Measured, read_results
from .remote import is_ours

__all__ = ["MADE_BY", "model_card"]

MADE_BY = "<!-- made by hf_tfast:"  # a card with this line may be replaced by another one
TEMPLATE = Path(__file__).with_name("template.md")
_KNOWN = {*inspect.signature(ModelCardData.__init__).parameters} - {"self", "kwargs", "eval_results", "model_name"}
_KNOWN |= {"base_model_relation", "widget", "inference", "new_version"}
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}


def model_card(
    model: PreTrainedModel,
    name: str,
    *,
    results: Sequence[str | Path] = (),
    remote_code: bool = False,
    description: str = "",
    **metadata: Any,
) -> ModelCard:
    """The card of a model with a FastPlan, or of a TFast model.

    name         of the model on the Hub, "user/model".
    results      files (or their folders) of `tfast quickstart`, `fidelity` and `bench` and of trainings.
    remote_code  does the model's repository hold its code?
    description  sentences of yours about the model.
    metadata     fields of huggingface_hub.ModelCardData: license (must be given), base_model, language, datasets, ...

    ValueError for a model that has nothing of hf_tfast, or runs something else than its plan; for a missing licence,
    unknown metadata, and results of another model.
    """
    if unknown := sorted(set(metadata) - _KNOWN):
        raise ValueError(f"model cards have no field {unknown[0]!r}; they have {', '.join(sorted(_KNOWN))}")
    licence = _licence(metadata)
    choice = _choice(model)
    planned = "model_type" not in choice
    length = _length(model)
    report = attention_report(model, length)
    if report.overruled:
        raise ValueError(
            f"this model runs attn_implementation={report.overruled[0]!r} instead of its plan: load it without, so "
            "that the card says what it runs"
        )
    facts = _facts(model, name, choice, metadata)
    measured = [read_results(path, facts) for path in results]
    runs = [m for m in facts.mechanisms if m["mechanism"] != "dense"]
    data = _data(model, name, metadata, measured, runs)
    base = _first(metadata.get("base_model"))
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name.rpartition("/")[2],
        name=name,
        about=" ".join(filter(None, [_about(model, base, planned), description])),
        auto=_auto(model),
        warnings=_warnings(planned, remote_code),
        layers=_layers(report.layers),
        length=length,
        mechanisms=_mechanisms(runs),
        choice=json.dumps(choice, indent=2),
        measured=measured,
        limits=_limits(base, bool(measured)),
        licence=licence,
    )


def _licence(metadata: dict[str, Any]) -> str:
    given = metadata.get("license")
    if given is None:
        raise ValueError(
            "a card needs a licence: give license='apache-2.0', say. For a converted model it is that of its base "
            "model; 'other' goes with license_name and license_link"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", str(given)):
        raise ValueError(f"a licence is given as the Hub names it, such as 'apache-2.0' or 'mit', got {given!r}")
    if given == "other" and not metadata.get("license_name"):
        raise ValueError("license='other' needs license_name and license_link")
    return str(metadata.get("license_name") or given)


def _choice(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of the fast parts: fields of a TFast config, and a plan."""
    config: Any = model.config
    choice: dict[str, Any] = {}
    if is_ours(model):
        names = ("model_type", "attention", "feed_forward", "position_encoding", "causal")
        choice = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    plan = getattr(config, "quantization_config", None)
    if isinstance(plan, FastPlan):
        choice["quantization_config"] = plan.to_dict()
    if not choice:
        raise ValueError(
            f"this {type(model).__name__} has neither a FastPlan nor a TFastConfig, so there is nothing to say of it: "
            "apply_plan(model, FastPlan(...)) first, or write its card by hand"
        )
    return choice


def _facts(model: PreTrainedModel, name: str, choice: dict[str, Any], metadata: dict[str, Any]) -> Facts:
    attention = choice.get("attention") or choice.get("quantization_config", {}).get("attention")
    base = metadata.get("base_model") or []
    names = [name, *([base] if isinstance(base, str) else base)]
    forms = choice.get("feed_forward") or choice.get("quantization_config", {}).get("feed_forward")
    return Facts(attention or {"mechanism": "dense"}, _dicts(attention), names, model.num_parameters(), forms)


def _dicts(attention: Any) -> list[dict[str, Any]]:
    """The mechanisms in a choice, each once: for all layers, ranges of them, one for each, in one stack or two."""
    if not attention:
        return [Dense().to_dict()]
    if "mechanism" in attention:
        return [mechanism_from_dict(attention).to_dict()]
    inner = attention if isinstance(attention, list) else attention.values()
    found = [one for part in inner for one in _dicts(part)]
    return [one for n, one in enumerate(found) if one not in found[:n]]


def _length(model: PreTrainedModel) -> int:
    """The length that densities are given at: the model's positions, 4096 at most."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(4096, known) if isinstance(known, int) and known > 0 else 4096


def _data(
    model: PreTrainedModel,
    name: str,
    metadata: dict[str, Any],
    measured: list[Measured],
    runs: list[dict[str, Any]],
) -> ModelCardData:
    figures = [figure for section in measured for figure in section.figures]
    tags = ["hf_tfast", *dict.fromkeys(f"{run['mechanism']}-attention" for run in runs)]
    given = {"library_name": "transformers", "pipeline_tag": _task(model) or _measured_task(figures), **metadata}
    given["tags"] = [*tags, *(tag for tag in metadata.get("tags") or [] if tag not in tags)]
    if figures:
        given.update(eval_results=figures, model_name=name.rpartition("/")[2])
    return ModelCardData(**{key: value for key, value in given.items() if value is not None})


def _task(model: PreTrainedModel) -> str | None:
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def _measured_task(figures: list[Any]) -> str | None:
    """Of a model whose class does not say (an encoder-decoder): what it was measured on."""
    return figures[0].task_type if figures else None


def _auto(model: PreTrainedModel) -> str:
    """The Auto class that loads this model again."""
    name = type(model).__name__
    heads = {end: f"AutoModel{end}" for end in _TASKS if end != "Model"}
    heads["ForConditionalGeneration"] = "AutoModelForSeq2SeqLM"
    return next((auto for end, auto in heads.items() if name.endswith(end)), "AutoModel")


def _about(model: PreTrainedModel, base: str | None, planned: bool) -> str:
    size = f"{model.num_parameters():,} parameters"
    if planned and base:
        return f"[{base}](https://huggingface.co/{base}) with fast attention ({size}): a plan in its config.json."
    if planned:
        return f"A {type(model).__name__} ({size}) with fast attention: a plan in its config.json."
    origin = f", made from [{base}](https://huggingface.co/{base})" if base else ""
    return f"A {type(model).__name__} ({size}){origin}: its attention is a field of its config."


def _warnings(planned: bool, remote_code: bool) -> list[str]:
    dense = (
        '`attn_implementation="sdpa"` runs the same weights densely: slower on long inputs, and with other outputs '
        "than those described here."
    )
    if planned:
        return [
            'Import hf_tfast before loading. Without it loading raises, for Transformers does not know "tfast"; it '
            "does not run densely unsaid.",
            dense,
        ]
    if remote_code:
        return [
            "Without hf_tfast: `trust_remote_code=True` runs `modeling_tfast.py` of this repository, generated from "
            "the package, on torch and Transformers alone. With `import hf_tfast` the installed code runs instead.",
            dense,
        ]
    return [
        "Import hf_tfast before loading. Without it Transformers does not know the model type, and "
        "`trust_remote_code=True` only says `pip install hf_tfast`: this repository holds no other code.",
        dense,
    ]


def _layers(layers: Sequence[LayerReport]) -> str:
    """A row for neighbouring layers that run the same."""
    rows = ["| layers | kind | mechanism | pairs read | attention FLOPs of dense |", "|---|---|---|---:|---:|"]
    for (stack, kind, mechanism), same in groupby(layers, key=lambda row: (row.stack, row.kind, row.mechanism)):
        found = list(same)
        first, last = found[0].layer, found[-1].layer
        where = f"{stack} {first}" if first == last else f"{stack} {first} to {last}"
        share = [f.density for f in found if f.density is not None]
        read = f"{sum(share) / len(share):.2%}" if share else "by content"
        cost = [(f.flops, f.dense_flops) for f in found if f.flops is not None]
        flops = f"{sum(c[0] for c in cost) / sum(c[1] for c in cost):.2%}" if cost else "by content"
        rows.append(f"| {where} | {kind} | `{mechanism}` | {read} | {flops} |")
    return "\n".join(rows)


def _mechanisms(runs: list[dict[str, Any]]) -> list[str]:
    """What each mechanism is and where it comes from, from its own docstring."""
    lines = []
    for name in dict.fromkeys(run["mechanism"] for run in runs):
        entry = next(e for e in catalogue.catalogue() if e["mechanism"] == name)
        lines.append(f"{entry['class']}: {entry['does']} Cost: {entry['cost']}. Source: {entry['source']}")
    return lines


def _limits(base: str | None, measured: bool) -> list[str]:
    lines = []
    if base:
        lines.append(f"Knowledge, bias and languages are those of {base}; this card measures none of them.")
    else:
        lines.append("Nothing was measured of bias, toxicity or truth of what it says.")
    if measured:
        lines.append("Figures are of one machine and one text each; measure on yours before you rely on them.")
    lines.append(
        "A model that reads fewer pairs gives other outputs than dense attention, most where far tokens matter."
    )
    return lines


def _first(value: Any) -> str | None:
    return value if isinstance(value, str) or value is None else next(iter(value), None)
