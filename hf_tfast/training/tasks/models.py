"""The model and tokenizer of a task: pretrained, made longer and fast, or a TFast model that begins at random."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...integration.apply import apply_plan
from ...integration.plan import FastPlan
from ...models import modeling_tfast, modeling_tfast_heads, modeling_tfast_seq2seq
from ...models.configuration_tfast import TFastConfig
from ...models.configuration_tfast_seq2seq import TFastSeq2SeqConfig
from ...positions import extend_positions
from ..arguments import _json
from ..tokens import byte_tokenizer, known_tokenizer, learned_tokenizer
from ._base import Task
from .arguments import TaskDataArguments, TaskModelArguments
from .tables import Row

__all__ = ["describe_choice", "find_tokenizer", "make_config", "make_model"]


def find_tokenizer(
    task: Task, data: TaskDataArguments, model: TaskModelArguments, rows: list[Row], kept: Path | None = None
) -> PreTrainedTokenizerBase:
    """The pretrained model's, or a saved, byte-level or learned one. ValueError where it cannot pad."""
    if kept is not None and kept.is_dir():
        return AutoTokenizer.from_pretrained(kept)
    if model.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model.model)
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {model.model} is not one of the `tokenizers` library")
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so which token it is does not matter
        if tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {model.model} has neither a padding nor an end token")
        return tokenizer
    length = max(data.source_length, data.target_length)
    two_way = not task.decoder_only
    if data.tokenizer == "bytes":
        return byte_tokenizer(length, two_way)
    if data.tokenizer == "learned":
        return learned_tokenizer(task.texts(rows), data.vocab_size, length, two_way)
    return known_tokenizer(data.tokenizer)


def make_config(
    task: Task, data: TaskDataArguments, model: TaskModelArguments, tokenizer: PreTrainedTokenizerBase, choice: Any
) -> Any:
    """The config: of the pretrained model with labels and dropout, or of a TFast model with `choice` in its fields."""
    labels = None if task.labels is None else dict(enumerate(task.labels))
    named = {} if labels is None else {"id2label": labels, "label2id": {name: n for n, name in labels.items()}}
    more = _json("--config", model.config)
    if model.model is not None:
        config = AutoConfig.from_pretrained(model.model, **{**named, **more})
        if model.dropout is not None:
            _set_dropout(config, model.dropout, model.model)
        return config
    seq2seq = task.ours == "TFastForConditionalGeneration"
    length = data.source_length + data.target_length + 2 if task.decoder_only else 2 + max(
        data.source_length, data.target_length
    )  # fmt: skip
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "mask")}
    if seq2seq:
        roles["decoder_start_token_id"] = tokenizer.bos_token_id
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": length,
        "initializer_range": model.hidden_size**-0.5,
        "hidden_dropout": model.dropout or 0.0,
        **roles,
        **named,
        **{name: value for name, value in choice.items() if value is not None},
        **more,
    }
    return TFastSeq2SeqConfig(**fields) if seq2seq else TFastConfig(**{"causal": task.decoder_only, **fields})


def _set_dropout(config: Any, rate: float, name: str) -> None:
    """Hidden dropout under the names that model families have for it."""
    known = [f for f in ("hidden_dropout", "hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop")
             if isinstance(getattr(config, f, None), float | int)]  # fmt: skip
    if not known:
        raise ValueError(f"the config of {name} has no field for hidden dropout; name it in --config")
    for field in known:
        setattr(config, field, rate)


def make_model(task: Task, model: TaskModelArguments, config: Any, choice: dict[str, Any]) -> PreTrainedModel:
    """Weights: read, made longer (--positions) and given the plan; or drawn."""
    if model.model is None:
        for home in (modeling_tfast, modeling_tfast_heads, modeling_tfast_seq2seq):
            if (found := getattr(home, task.ours, None)) is not None:
                return found(config)
        raise ValueError(f"the TFast family has no {task.ours}")
    made = getattr(transformers, task.auto).from_pretrained(model.model, config=config)
    if model.positions is not None:
        extend_positions(made, model.positions)
    if choice:
        apply_plan(made, FastPlan(**choice))
    return made


def describe_choice(model: TaskModelArguments, config: Any, choice: dict[str, Any]) -> dict[str, Any]:
    """attention and feed_forward as a record keeps them: as in config.json."""
    if model.model is None:
        kept = {"attention": config.attention, "feed_forward": config.feed_forward}
    else:
        plan = FastPlan(**choice).to_dict() if choice else {}
        kept = {"attention": plan.get("attention"), "feed_forward": plan.get("feed_forward")}
    return json.loads(json.dumps({**kept, "attention": kept["attention"] or {"mechanism": "dense"}}))
