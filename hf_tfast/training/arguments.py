"""What a training is told: data, model, and TrainingArguments with defaults for training from scratch."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..attention import mechanism_from_dict, mechanisms
from ..integration.plan import FastPlan
from .scaling import ScalingArguments

BYTES, LEARNED = "bytes", "learned"


def _option(default: Any, text: str) -> Any:
    """A field with its help; lists are made anew for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """Which texts, in which tokens, in how long sequences."""

    text: list[str] = _option(
        ["python"], "files, globs, folders, or 'python': the running Python's sources and documentation"
    )
    validation_text: list[str] = _option([], "validation texts; without them documents of --text are held out")
    validation_share: float = _option(0.05, "share of the text that is held out, by document")
    dataset: str | None = _option(None, "a data set of the Hub instead of --text (may use the network)")
    dataset_config: str | None = _option(None, "its configuration")
    dataset_split: str = _option("train", "its split")
    text_column: str = _option("text", "its column of text")
    tokenizer: str = _option(LEARNED, "'learned' in the run, 'bytes', or a saved tokenizer's folder or name")
    vocab_size: int = _option(4096, "tokens of a learned tokenizer")
    length: int = _option(2048, "tokens of a sequence")
    validation_sequences: int = _option(32, "sequences to evaluate on, at most")
    far: int = _option(256, "a token is far when it last occurred more than this many tokens ago")
    unit: int | None = _option(
        None, "tokens of one occurrence; without it 1, for bytes 6 (see hf_tfast.training.occurrences)"
    )

    def __post_init__(self) -> None:
        if self.dataset is not None and self.text not in ([], ["python"]):
            raise ValueError(f"name either a data set or texts, got --dataset {self.dataset} and --text {self.text}")
        for name, least in (("length", 2), ("validation_sequences", 1), ("far", 1), ("unit", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass
class ModelArguments:
    """The sizes of a TFast model and its attention."""

    attention: str = _option("dense", 'a mechanism\'s name, or JSON: \'{"mechanism": "window", "window": 256}\'')
    compare: list[str] = _option([], "several of these: the same training for each, and one table")
    hidden_size: int = _option(256, "width")
    layers: int = _option(4, "layers")
    heads: int = _option(4, "attention heads")
    intermediate_size: int = _option(704, "width of the gated feed-forward")
    model: str = _option("{}", "JSON of further fields of TFastConfig")

    def __post_init__(self) -> None:
        for given in [self.attention, *self.compare]:
            read_attention(given)
        _json("--model", self.model)

    def fields(self) -> dict[str, Any]:
        """What TFastConfig is made with, attention aside."""
        sizes = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "initializer_range": self.hidden_size**-0.5,  # TFastConfig's 0.02 is for wider models; this learns faster
        }
        return {**sizes, **_json("--model", self.model)}


# Settings that a training cannot change between its beginning and its resumption.
FIXED = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "learning_rate",
    "masked_share",
    "max_grad_norm",
    "max_steps",
    "mixed_precision",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
    "warmup_steps",
    "weight_decay",
    "world_size",
)


@dataclass
class PretrainingArguments(ScalingArguments, TrainingArguments):
    """TrainingArguments with these defaults; `--help` lists everything."""

    output_dir: str | None = _option("runs/pretrain", "a new folder for everything that the training leaves")
    overwrite: bool = _option(False, "replace an earlier training in output_dir")
    resume_from_checkpoint: str | None = _option(
        None, "'last': go on where the training in output_dir stopped, or begin; or a checkpoint's folder"
    )
    max_steps: int = _option(600, "steps of the optimiser")
    learning_rate: float = _option(2.5e-3, "its highest value")
    warmup_steps: float = _option(0.05, "steps (or a share of them) over which it rises")
    lr_scheduler_type: str = _option("cosine", "how it falls afterwards")
    weight_decay: float = _option(0.1, "of matrices")
    adam_beta2: float = _option(0.95, "AdamW forgets the size of gradients this fast")
    per_device_train_batch_size: int = _option(1, "sequences of a step and device")
    per_device_eval_batch_size: int = _option(1, "sequences at once in evaluation")
    eval_strategy: str = _option("steps", "when to evaluate")
    eval_steps: float | None = _option(0.1, "steps (or share of them) between evaluations")
    save_strategy: str = _option("steps", "when to save a checkpoint")
    save_steps: float = _option(0.1, "steps (or share of them) between checkpoints")
    save_total_limit: int | None = _option(2, "checkpoints to keep")
    logging_steps: float = _option(10, "steps between lines of progress")
    masked_share: float = _option(0.15, "masked language models: share of tokens to predict")
    plot: bool = _option(True, "draw the curves (needs matplotlib)")
    report: str | None = _option(None, "with --compare: the folder for results.json, table.md and curves.png")
    prompt: str | None = _option(None, "what the sample from the saved model begins with (its masked text)")

    def __post_init__(self) -> None:
        if not 0 < self.masked_share < 1:
            raise ValueError(f"masked_share must lie between 0 and 1, got {self.masked_share}")
        self.remove_unused_columns = False  # our rows hold what the models take, and nothing else
        self.include_num_input_tokens_seen = "all"
        self.logging_nan_inf_filter = False  # it would hide that a training has diverged
        self.share()
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to

    def fixed(self) -> dict[str, Any]:
        """The settings on which the result depends."""
        chosen = {"lr_scheduler_type": SchedulerType(self.lr_scheduler_type), "optim": OptimizerNames(self.optim)}
        fixed = {name: getattr(self, name) for name in FIXED} | {name: x.value for name, x in chosen.items()}
        if not self.layout.plain:  # processes that share rows count once
            fixed["world_size"] = self.layout.data_ranks
        return fixed


def read_attention(given: str) -> dict[str, Any]:
    """A mechanism's name or JSON -> the dict of config.json, one mechanism or ranges of layers. Else ValueError."""
    if not given.lstrip().startswith("{"):
        if given not in mechanisms():
            raise ValueError(f"unknown attention {given!r}; expected one of {', '.join(mechanisms())}, or JSON")
        return mechanism_from_dict({"mechanism": given}).to_dict()
    return FastPlan(attention=_json("--attention", given)).to_dict()["attention"]


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object of fields and values, got {text}")
    return value
