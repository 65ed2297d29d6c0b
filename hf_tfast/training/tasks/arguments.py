"""What a task is told: its data, its model, and TrainingArguments with what Trainer lacks."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainingArguments

from ...integration.plan import FastPlan
from ...models.configuration_tfast import TFastConfig
from ...models.configuration_tfast_seq2seq import TFastSeq2SeqConfig
from ..arguments import _json, _option, read_attention
from ..scaling import ScalingArguments
from .optimisers import check_optimiser, own_optimiser

__all__ = ["TaskDataArguments", "TaskModelArguments", "TaskTrainingArguments", "read_choice", "read_pairs"]


@dataclass
class TaskDataArguments:
    """Which examples, in which columns, in which tokens."""

    train_file: list[str] = _option([], "files or globs: JSONL, JSON, CSV, TSV, text, each also .gz")
    validation_file: list[str] = _option([], "without them, --validation_share of the training rows is held out")
    test_file: list[str] = _option([], "what the best checkpoint is scored on in the end; else the validation rows")
    dataset: str | None = _option(None, "a data set of the Hub instead of files (may use the network)")
    dataset_config: str | None = _option(None, "its configuration")
    train_split: str = _option("train", "its split to train on")
    validation_split: str | None = _option(None, "its split to validate on")
    test_split: str | None = _option(None, "its split to test on")
    columns: list[str] = _option([], "role=column, such as source=0 target=1, text=review label=stars")
    validation_share: float = _option(0.05, "share of the training rows held out where no validation rows are named")
    group_column: str | None = _option(None, "rows with the same value here are not separated by that")
    train_rows: int | None = _option(None, "rows to train on, at most (drawn by seed)")
    validation_rows: int | None = _option(500, "rows to validate on, at most (drawn by seed)")
    test_rows: int | None = _option(None, "rows to test on, at most (drawn by seed)")
    source_length: int = _option(512, "tokens of an input; longer ones are cut")
    target_length: int = _option(128, "tokens of an output; longer ones are cut")
    tokenizer: str = _option("learned", "from scratch: 'learned' in the run, 'bytes', or a saved tokenizer")
    vocab_size: int = _option(8000, "tokens of a learned tokenizer")
    turns: int = _option(6, "dialogue: turns of the context, at most")
    stride: int = _option(128, "question answering: tokens that neighbouring pieces of a long context share")
    label_patterns: str = _option("{}", 'token labels by JSON of regular expressions: {"TIME": "\\\\d+:\\\\d\\\\d"}')

    def __post_init__(self) -> None:
        if self.dataset is not None and self.train_file:
            raise ValueError(f"name either --dataset or --train_file, got {self.dataset} and {self.train_file}")
        for name, least in (("source_length", 4), ("target_length", 2), ("turns", 1), ("stride", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("train_rows", "validation_rows", "test_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.column_names()
        _json("--label_patterns", self.label_patterns)

    def column_names(self) -> dict[str, str]:
        return read_pairs("--columns", self.columns)


@dataclass
class TaskModelArguments:
    """A pretrained model, or the sizes of a TFast model that begins at random; and what is fast in it."""

    model: str | None = _option(None, "Hub id or folder of a pretrained model; without it a TFast model from scratch")
    attention: str | None = _option(None, "a mechanism's name or JSON; for encoder-decoders also by stack")
    feed_forward: str | None = _option(None, 'JSON of a form or a list: {"form": "low_rank", "ratio": 0.5}')
    compare: list[str] = _option([], "several: a mechanism's name or JSON, or JSON with attention and feed_forward")
    positions: int | None = _option(None, "extend a pretrained model to so many positions first")
    decoder_only: bool = _option(False, "dialogue: one causal stack instead of an encoder and a decoder")
    hidden_size: int = _option(256, "from scratch: width")
    layers: int = _option(3, "from scratch: layers (of each stack)")
    heads: int = _option(4, "from scratch: attention heads")
    intermediate_size: int = _option(704, "from scratch: width of the gated feed-forward")
    dropout: float | None = _option(None, "hidden dropout; None: as the model has it")
    config: str = _option("{}", "JSON of further fields of the model's config")

    def __post_init__(self) -> None:
        if self.compare and (self.attention or self.feed_forward):
            raise ValueError("--compare names every choice itself: leave out --attention and --feed_forward")
        if self.positions is not None and self.model is None:
            raise ValueError("--positions extends a pretrained model; from scratch lengths come from --source_length")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        _json("--config", self.config)
        for choice in self.choices().values():
            if self.model is None:
                TFastSeq2SeqConfig.saved_attention(choice.get("attention"))
                TFastConfig.saved_feed_forward(choice.get("feed_forward"))
            elif choice:
                FastPlan(**choice)

    def choices(self) -> dict[str, dict[str, Any]]:
        """Label -> attention and feed_forward of every model that is to be trained; {} for an unchanged one."""
        if self.compare:
            made = [read_choice(text) for text in self.compare]
        else:
            forward = None if self.feed_forward is None else json.loads(self.feed_forward)
            made = [read_choice(self.attention or "dense") | ({"feed_forward": forward} if forward else {})]
        labels = [_label(choice) for choice in made]
        repeated = {label for label in labels if labels.count(label) > 1}
        return {
            f"{label}-{n + 1}" if label in repeated else label: choice
            for n, (label, choice) in enumerate(zip(labels, made, strict=True))
        }


@dataclass
class TaskTrainingArguments(ScalingArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with these defaults, and regularisation, growing batches, search, and layouts."""

    output_dir: str | None = _option("runs/task", "a new folder for everything that the training leaves")
    overwrite: bool = _option(False, "replace an earlier training in output_dir")
    resume_from_checkpoint: str | None = _option(None, "'last': go on where the training in output_dir stopped")
    optim: str = _option("adamw_torch", "an optimiser of Transformers, or adamw, adamw_8bit, adadelta")
    compare_optim: list[str] = _option([], "several optimisers with their learning rates: adamw=1e-3 sgd=0.5")
    train_sampling_strategy: str = _option("group_by_length", "rows of similar length together: little padding")
    lr_scheduler_type: str = _option("cosine", "how the learning rate falls")
    warmup_steps: float = _option(0.05, "steps (or a share of them) over which it rises")
    eval_strategy: str = _option("steps", "when to validate")
    eval_steps: float | None = _option(0.2, "steps (or share of them) between validations")
    save_strategy: str = _option("steps", "when to save a checkpoint")
    save_steps: float = _option(0.2, "steps (or share of them) between checkpoints")
    save_total_limit: int | None = _option(2, "checkpoints to keep; the best is among them")
    load_best_model_at_end: bool = _option(True, "the best checkpoint by metric_for_best_model is what is kept")
    early_stopping: int | None = _option(None, "validations without progress before the training stops")
    logging_steps: float = _option(50, "steps between lines of progress")
    l1: float = _option(0.0, "weight of the sum of |w| over matrices in the loss")
    r_drop: float = _option(0.0, "weight of R-Drop: two passes with different dropout shall agree")
    token_dropping: float = _option(0.0, "share of input tokens removed in training, drawn anew each epoch")
    token_masking: float = _option(0.0, "share of input tokens replaced by the mask token in training")
    grow_batch_to: int | None = _option(None, "batches double up to this size at equal shares of the training")
    search_trials: int = _option(0, "trials of a hyper-parameter search (needs optuna); 0: none")
    search_space: str = _option("{}", 'JSON: {"learning_rate": [1e-5, 1e-3, "log"], "weight_decay": [0, 0.1]}')
    report: str | None = _option(None, "folder for results.json and table.md")

    def __post_init__(self) -> None:
        self.optim = check_optimiser(self.optim)
        for name in ("token_dropping", "token_masking"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("l1", "r_drop"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.grow_batch_to is not None and "epoch" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError("with --grow_batch_to the whole training is one epoch: evaluate and save by steps")
        if self.early_stopping is not None and not self.load_best_model_at_end:
            raise ValueError("--early_stopping needs load_best_model_at_end=true: it asks what the best was")
        self.optimisers()
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # it would hide that a training has diverged
        self.share()
        self._check_layout()
        asked, self.optim = self.optim, "sgd" if own_optimiser(self.optim) else self.optim
        super().__post_init__()
        self.optim = asked
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        if self.n_gpu > 1:
            raise ValueError("several GPUs in one process are not used: start one process each, accelerate launch")

    def _check_layout(self) -> None:
        """ValueError where processes share what the recipes of tasks cannot share, or with what they cannot."""
        if self.layout.sequence * self.layout.pipeline > 1:
            raise ValueError(
                f"recipes of tasks share weights (--tensor_parallel, --shard, --replicas) and rows, and the layout is "
                f"{self.layout}; sequences and pipelines are shared in recipes/pretrain_clm.py and pretrain_mlm.py: "
                "take recipes/accelerate/ddp.yaml, fsdp2.yaml or tensor_parallel.yaml"
            )
        if self.average_every > 1:
            raise ValueError("recipes of tasks average in every step: leave --average_every out")
        if not self.layout.plain and (self.l1 or self.search_trials):
            name = "l1" if self.l1 else "search_trials"
            raise ValueError(f"--{name} needs whole models in every process, and the layout is {self.layout}")

    def optimisers(self) -> dict[str, float]:
        """Optimiser -> learning rate, of all that are to be compared."""
        pairs = read_pairs("--compare_optim", self.compare_optim)
        return {check_optimiser(name): float(rate) for name, rate in pairs.items()}


def read_pairs(option: str, given: list[str]) -> dict[str, str]:
    """["a=b", ...] -> {"a": "b"}. ValueError for anything else."""
    found = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not (name and sign and value) or name in found:
            raise ValueError(f"{option} takes name=value pairs with different names, got {' '.join(given)!r}")
        found[name] = value
    return found


def read_choice(text: str) -> dict[str, Any]:
    """A mechanism's name or JSON, or JSON with attention and feed_forward -> keywords of a FastPlan; {}: dense."""
    if text == "dense":
        return {}
    if text.lstrip().startswith("{"):
        given = _json("--compare", text)
        if {"attention", "feed_forward"} & set(given):
            if more := sorted(set(given) - {"attention", "feed_forward"}):
                raise ValueError(f"a choice has attention and feed_forward, got {more[0]!r} beside them")
            if isinstance(given.get("attention"), str):
                given["attention"] = read_attention(given["attention"])
            return given
        if {"encoder", "decoder"} & set(given):
            return {"attention": given}
    return {"attention": read_attention(text)}


def _label(choice: dict[str, Any]) -> str:
    """A short name for a choice, and for its folder: window, window+low_rank, low_rank, dense."""
    attention, forward = choice.get("attention"), choice.get("feed_forward")
    names = []
    if attention:
        names.append(attention.get("mechanism", "layers") if isinstance(attention, dict) else "layers")
    for form in forward if isinstance(forward, list) else [forward] if forward else []:
        names.append(form.get("form", "layers") if isinstance(form, dict) else str(form))
    return "+".join(names) or "dense"
