"""Tasks whose answer is a class: of a text (or a pair of texts), or of every token."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..arguments import _json
from ..packing import IGNORED
from ._base import Task
from .arguments import TaskDataArguments
from .examples import Examples
from .tables import Row, text_of

__all__ = ["SequenceLabels", "TokenLabels"]


class SequenceLabels(Task):
    """text and label columns (text_pair may be there too); labels are names or numbers."""

    name = "sequence"
    needed = ("text", "label")
    kind = "class"
    metrics = ("accuracy", "f1")
    shown = ("accuracy", "f1")
    best, greater = "accuracy", True
    auto = "AutoModelForSequenceClassification"
    ours = "TFastForSequenceClassification"

    def learn_labels(self, rows: Sequence[Row], data: TaskDataArguments) -> None:
        if (empty := next((n for n, row in enumerate(rows) if row["label"] in (None, "")), None)) is not None:
            raise ValueError(f"training row {empty} has no label")
        found = {row["label"] for row in rows}
        numbers = all(isinstance(one, int) or (isinstance(one, str) and one.isdecimal()) for one in found)
        self.labels = [str(one) for one in sorted(found, key=int if numbers else str)]
        if len(self.labels) < 2:
            raise ValueError(f"classification needs two classes at least; all labels are {self.labels[0]!r}")

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield text_of(row, "text", self.name)

    def examples(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: TaskDataArguments, config: Any
    ) -> Examples:
        numbers = {name: n for n, name in enumerate(self.labels or [])}
        if unknown := sorted({str(row["label"]) for row in rows} - set(numbers)):
            raise ValueError(f"label {unknown[0]!r} is not among the training labels ({', '.join(numbers)})")
        given: list[list[str]] = [[text_of(row, "text", self.name) for row in rows]]
        if rows and rows[0].get("text_pair") is not None:
            given.append([text_of(row, "text_pair", self.name) for row in rows])
        if not any(text.strip() for text in given[0]):
            raise ValueError(f"text is empty in all of the {len(rows)} rows")
        coded = tokenizer(*given, truncation=True, max_length=data.source_length)
        features = [
            {**{name: coded[name][n] for name in coded}, "labels": numbers[str(row["label"])]}
            for n, row in enumerate(rows)
        ]
        return Examples(features, list(rows))

    def score(self, predictions: Any, examples: Examples) -> dict[str, float]:
        from ...metrics import load

        said = predictions.argmax(-1).tolist()
        true = [one["labels"] for one in examples.features]
        return {
            **load("accuracy").compute(predictions=said, references=true),
            "f1": load("f1").compute(predictions=said, references=true)["f1"],
        }

    def answers(self, predictions: Any, examples: Examples) -> list[Any]:
        return [(self.labels or [])[n] for n in predictions.argmax(-1).tolist()]


class TokenLabels(Task):
    """tokens and tags (a list each, of the same length); or text, with labels from --label_patterns.

    Only the first piece of a word has a label; the others are never counted.
    """

    name = "token"
    needed = ("tokens", "tags")
    kind = "tokens"
    metrics = ("spans",)
    shown = ("f1", "precision", "recall", "accuracy")
    best, greater = "f1", True
    unrolls = "text"
    auto = "AutoModelForTokenClassification"
    ours = "TFastForTokenClassification"

    def unroll(self, rows: Sequence[Row], data: TaskDataArguments) -> list[Row]:
        """Texts (a text, or a list of them) -> words and labels B-NAME, I-NAME of what the patterns match."""
        patterns = _json("--label_patterns", data.label_patterns)
        if not patterns:
            raise ValueError("token labels from a text column need --label_patterns; else name tokens and tags")
        try:
            found = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in patterns.items()}
        except re.error as error:
            raise ValueError(f"--label_patterns holds no regular expression: {error}") from error
        texts = [one for row in rows for one in (row["text"] if isinstance(row["text"], list) else [row["text"]])]
        return [labelled(text_of({"text": text}, "text", self.name), found) for text in texts]

    def learn_labels(self, rows: Sequence[Row], data: TaskDataArguments) -> None:
        for n, row in enumerate(rows):
            tokens, tags = row["tokens"], row["tags"]
            if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
                raise ValueError(f"training row {n}: tokens and tags are lists of the same length, got {tokens!r:.60} "
                                 f"and {tags!r:.60}")  # fmt: skip
        self.labels = sorted({str(tag) for row in rows for tag in row["tags"]}, key=lambda tag: (tag != "O", tag))
        if len(self.labels) < 2:
            raise ValueError(
                f"token classification needs two labels at least, found {', '.join(self.labels) or 'none'}"
            )

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield " ".join(row["tokens"])

    def examples(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: TaskDataArguments, config: Any
    ) -> Examples:
        numbers = {name: n for n, name in enumerate(self.labels or [])}
        used = [row for row in rows if row["tokens"]]
        if not used:
            raise ValueError(f"tokens are empty in all of the {len(rows)} rows")
        if unknown := sorted({str(tag) for row in used for tag in row["tags"]} - set(numbers)):
            raise ValueError(f"label {unknown[0]!r} is not among the training labels ({', '.join(numbers)})")
        features = []
        for row in used:
            ids: list[int] = []
            labels: list[int] = []
            for n, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
                pieces = tokenizer(word if n == 0 else f" {word}", add_special_tokens=False)["input_ids"]
                if not pieces:
                    pieces = [tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id]
                ids += pieces
                labels += [numbers[str(tag)], *[IGNORED] * (len(pieces) - 1)]
            front, back = frame(tokenizer)
            room = data.source_length - len(front) - len(back)
            features.append({"input_ids": [*front, *ids[:room], *back],
                             "labels": [*[IGNORED] * len(front), *labels[:room], *[IGNORED] * len(back)]})  # fmt: skip
        return Examples(features, used)

    def score(self, predictions: Any, examples: Examples) -> dict[str, float]:
        from ...metrics import load

        said = self.answers(predictions, examples)
        true = [[(self.labels or [])[n] for n in one["labels"] if n != IGNORED] for one in examples.features]
        return dict(load("spans").compute(predictions=said, references=true))

    def answers(self, predictions: Any, examples: Examples) -> list[Any]:
        """The labels of every row's words, as far as they were read."""
        found = []
        for scores, one in zip(np.asarray(predictions).argmax(-1), examples.features, strict=True):
            kept = [n for n, label in enumerate(one["labels"]) if label != IGNORED]
            found.append([(self.labels or [])[scores[n]] for n in kept])
        return found


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that this tokenizer puts before and behind a text."""
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(n for n in range(len(whole)) if whole[n : n + len(word)] == word)
    return whole[:at], whole[at + len(word) :]


def labelled(text: str, patterns: dict[str, re.Pattern[str]]) -> Row:
    """Words (runs of letters and digits, other signs alone) and B-, I- labels; the first pattern that matches wins."""
    words = list(re.finditer(r"\w+|[^\w\s]", text))
    tags = ["O"] * len(words)
    for name, pattern in patterns.items():
        for match in pattern.finditer(text):
            inside = [n for n, w in enumerate(words) if w.start() < match.end() and w.end() > match.start()]
            if inside and all(tags[n] == "O" for n in inside):
                tags[inside[0]] = f"B-{name}"
                tags[inside[0] + 1 : inside[-1] + 1] = [f"I-{name}"] * (len(inside) - 1)
    return {"tokens": [w.group() for w in words], "tags": tags}
