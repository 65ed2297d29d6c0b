"""Tasks whose answer is a text: translation, summarisation and dialogue.

An encoder-decoder reads the source and writes the target. A decoder (dialogue) continues: prompt and answer are one
sequence, of which only the answer is learned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..packing import IGNORED
from ._base import Task
from .arguments import TaskDataArguments
from .examples import Examples
from .tables import Row, text_of

__all__ = ["Dialogue", "Summarization", "TextTask", "Translation"]


class TextTask(Task):
    """source and target columns; a list of targets holds several references, of which the first is learned."""

    needed = ("source", "target")
    kind = "tokens"
    generates = True
    best, greater = "loss", False

    def __init__(self, decoder_only: bool = False) -> None:
        self.decoder_only = decoder_only
        self.auto, self.ours = "AutoModelForSeq2SeqLM", "TFastForConditionalGeneration"
        if decoder_only:
            self.kind, self.auto, self.ours = "next", "AutoModelForCausalLM", "TFastForCausalLM"

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield text_of(row, "source", self.name)
            yield from self.references(row)

    def references(self, row: Row) -> list[str]:
        target = row["target"]
        return list(target) if isinstance(target, list) and target else [text_of(row, "target", self.name)]

    def examples(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: TaskDataArguments, config: Any
    ) -> Examples:
        used = [row for row in rows if text_of(row, "source", self.name).strip() and self.references(row)[0].strip()]
        if not used:
            raise ValueError(f"{self.name}: none of the {len(rows)} rows has both a source and a target that is text")
        sources = [text_of(row, "source", self.name) for row in used]
        targets = [self.references(row)[0] for row in used]
        make = self._continued if self.decoder_only else self._translated
        return Examples(make(sources, targets, tokenizer, data, config), used)

    def _translated(
        self, sources: list[str], targets: list[str], tokenizer: Any, data: TaskDataArguments, config: Any
    ) -> list[dict[str, Any]]:
        prefix = (getattr(config, "task_specific_params", None) or {}).get(self.name, {}).get("prefix", "")
        coded = tokenizer([prefix + text for text in sources], truncation=True, max_length=data.source_length)
        wanted = tokenizer(text_target=targets, truncation=True, max_length=data.target_length + 1)["input_ids"]
        first, last = config.decoder_start_token_id, tokenizer.eos_token_id
        features = []
        for ids, labels in zip(coded["input_ids"], wanted, strict=True):
            labels = labels[1:] if labels and labels[0] == first else labels
            if last is not None and (not labels or labels[-1] != last):
                labels = [*labels, last]
            features.append({"input_ids": ids, "labels": labels, "decoder": True})
        return features

    def _continued(
        self, sources: list[str], targets: list[str], tokenizer: Any, data: TaskDataArguments, config: Any
    ) -> list[dict[str, Any]]:
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"  # the end of a prompt matters most
        try:
            prompts = tokenizer(
                [f"{text}\n" for text in sources], truncation=True, max_length=data.source_length,
                add_special_tokens=False,
            )["input_ids"]  # fmt: skip
        finally:
            tokenizer.truncation_side = side
        answers = tokenizer(targets, truncation=True, max_length=data.target_length, add_special_tokens=False)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        features = []
        for prompt, answer in zip(prompts, answers["input_ids"], strict=True):
            front = [*begin, *prompt]
            labels = [*[IGNORED] * len(front), *answer, tokenizer.eos_token_id]
            features.append({"input_ids": [*front, *answer, tokenizer.eos_token_id], "labels": labels,
                             "own_labels": True})  # fmt: skip
        return features

    def score_texts(self, made: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        from ...metrics import load

        references = [self.references(row) for row in rows]
        found: dict[str, float] = {}
        for name in self.metrics:
            found |= load(name).compute(predictions=list(made), references=references)
        return found


class Translation(TextTask):
    name = "translation"
    metrics = ("bleu",)
    shown = ("bleu", "chrf")


class Summarization(TextTask):
    name = "summarization"
    metrics = ("rouge",)
    shown = ("rouge1", "rouge2", "rougeL")


class Dialogue(TextTask):
    """Rows of `turns` (a list of utterances by two speakers in turn): every second one is an answer to those before.
    Or rows of source and target."""

    name = "dialogue"
    metrics = ("bleu",)
    shown = ("perplexity", "bleu")
    unrolls = "turns"

    def unroll(self, rows: Sequence[Row], data: TaskDataArguments) -> list[Row]:
        found = []
        for row in rows:
            turns = row["turns"]
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise ValueError(f"turns of {self.name} is no list of texts but {str(turns)[:60]!r}")
            for n in range(1, len(turns), 2):
                found.append({"source": "\n".join(turns[max(0, n - data.turns) : n]), "target": turns[n]})
        if not found:
            raise ValueError("dialogue: no row has two turns, so there is nothing to answer")
        return found
