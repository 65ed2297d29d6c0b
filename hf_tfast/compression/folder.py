"""A model in a folder, converted into another folder: what `tfast convert` does.

Texts are cut into rows of equal length, so that nothing is padded; the model is loaded as the class that its config
names, so that its head stays.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..attention import mechanism_from_dict
from ..benchmarking.folder import check_new, new_folder
from ..feed_forward import Form, form_from_dict
from ..integration.plan import FastPlan
from ..models import modeling_tfast, modeling_tfast_heads, modeling_tfast_seq2seq
from .convert import convert
from .report import Conversion

__all__ = ["Request", "convert_folder", "read_batches", "read_forms", "read_plan"]

MARK = "config.json"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 4  # of a batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """model     Hub id or folder of a dense model.
    plan         what it becomes.
    out          folder to make, for model, tokenizer and the report; it must not exist.
    calibration  text file in UTF-8; None for plans that need no data: then nothing is measured either.
    length       tokens of a row, where the model reads so many.
    tokens       of the text at most.
    dtype        of the weights: "auto" as the checkpoint has them, or float32, bfloat16, float16.
    rounds       forwards of each that are timed.
    recovery_steps   steps of fitting each feed-forward to the dense one's outputs.
    """

    model: str
    plan: FastPlan
    out: Path
    calibration: Path | None = None
    length: int = 512
    tokens: int = 32768
    dtype: str = "auto"
    rounds: int = 5
    recovery_steps: int = 0


def convert_folder(request: Request, report: Callable[[str], None] = lambda text: None) -> Conversion:
    """Load, convert, and save; the folder appears whole or not at all.

    FileExistsError where `out` exists; ValueError for what cannot be used, before the weights are read where possible.
    """
    check_new(request.out, False, MARK)
    if request.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    config = AutoConfig.from_pretrained(request.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.model)
    except (OSError, ValueError):
        if request.calibration is not None:
            raise
        tokenizer = None
    batches = None
    if request.calibration is not None:
        text = request.calibration.read_text(encoding="utf-8")
        batches = read_batches(text, tokenizer, config, request.length, request.tokens)
        report(f"{sum(batch['input_ids'].numel() for batch in batches)} tokens of {request.calibration.name}")
    report(f"loading {request.model}")
    model = model_class(config).from_pretrained(request.model, dtype=DTYPES[request.dtype])
    report("converting")
    model, found = convert(model, request.plan, batches, rounds=request.rounds, recovery_steps=request.recovery_steps)
    report("saving")
    with new_folder(request.out, mark=MARK) as working:
        model.save_pretrained(working)
        if tokenizer is not None:
            tokenizer.save_pretrained(working)
        found.write(working / "conversion")
    return found


def model_class(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint was saved as; AutoModel where its config names none that is known."""
    for name in getattr(config, "architectures", None) or ():
        for home in (transformers, modeling_tfast, modeling_tfast_heads, modeling_tfast_seq2seq):
            if (found := getattr(home, name, None)) is not None:
                return found
    return AutoModel


def read_batches(
    text: str, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig, length: int, tokens: int
) -> list[dict[str, Tensor]]:
    """Rows of `length` tokens with the tokenizer's special ones, four a batch; the rest of the text is left out."""
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError("calibration text needs a tokenizer of the `tokenizers` library in the model's folder")
    if not text.strip():
        raise ValueError("the calibration text is empty")
    if length < 8 or tokens < length:
        raise ValueError(f"length is at least 8 and tokens at least length, got length={length}, tokens={tokens}")
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min([length, tokenizer.model_max_length, *([most] if isinstance(most, int) and most > 0 else [])])
    cut = tokenizer(text[: tokens * 32], truncation=True, max_length=length, return_overflowing_tokens=True)
    rows = [ids for ids in cut["input_ids"] if ids]
    full = [ids for ids in rows if len(ids) == length] or rows[:1]
    ids = torch.tensor(full[: max(1, tokens // length)])
    decoder = {"labels": ids} if config.is_encoder_decoder else {}
    return [
        {"input_ids": part, **{name: value[n * ROWS : n * ROWS + ROWS] for name, value in decoder.items()}}
        for n, part in enumerate(ids.split(ROWS))
    ]


def read_plan(file: Path | None, attention: str | None, feed_forward: str | None) -> FastPlan:
    """A plan from a JSON file, or from words: "window:window=256,sinks=4", "pruned:ratio=0.75 + int8"."""
    if file is not None:
        if attention is not None or feed_forward is not None:
            raise ValueError("--plan holds the whole plan: leave out --attention and --feed-forward")
        given = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError(f"{file} holds no plan: a JSON object with attention and feed_forward is expected")
        given = given.get("quantization_config", given)
        if "sizes" in given:
            raise ValueError(f"{file} is the plan of a converted checkpoint (it has sizes): leave its sizes out")
        if "plan_version" in given:
            return FastPlan(**{k: v for k, v in FastPlan.from_dict(given).to_dict().items() if k in _FIELDS})
        return FastPlan(**given)
    if attention is None and feed_forward is None:
        raise ValueError("nothing to do: give --plan FILE, --attention or --feed-forward")
    forms = read_forms(feed_forward or "")
    return FastPlan(
        attention=None if attention is None else mechanism_from_dict(_words(attention, "mechanism")),
        feed_forward=forms or None,
    )


def read_forms(text: str) -> list[Form]:
    """ "pruned:ratio=0.75 + int8" as forms, in that order; none of an empty text."""
    return [form_from_dict(_words(part, "form")) for part in text.split("+") if part.strip()]


_FIELDS = ("attention", "feed_forward", "base")


def _words(text: str, kind: str) -> dict[str, Any]:
    """ "window:window=256,sinks=4" as a dict; values as JSON reads them, else as they are."""
    name, _, rest = text.strip().partition(":")
    found: dict[str, Any] = {kind: name.strip()}
    for field in re.split(r",(?![^\[]*\])", rest):
        if not field.strip():
            continue
        key, sign, value = field.partition("=")
        if not sign:
            raise ValueError(f"expected {name}:field=value,field=value, got {text!r}")
        try:
            found[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[key.strip()] = value.strip()
    return found
