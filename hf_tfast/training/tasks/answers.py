"""Extractive question answering: where in a context does the answer begin and end?

A context that is longer than the input is cut into pieces that overlap by `stride` tokens; a piece without the whole
answer learns its first token instead, and the answer of a question is the best span of all of its pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ._base import Task
from .arguments import TaskDataArguments
from .examples import Examples
from .tables import Row, text_of

__all__ = ["Answers"]

BEST, LONGEST = 20, 30  # beginnings and ends that are tried, and tokens of an answer


class Answers(Task):
    """question, context and answers; answers as in SQuAD: {"text": [..], "answer_start": [..]}, or a list of
    {"text", "answer_start"}, of which the first is learned."""

    name = "qa"
    needed = ("question", "context", "answers")
    kind = "span"
    metrics = ("exact_match",)
    shown = ("exact_match", "f1")
    best, greater = "f1", True
    auto = "AutoModelForQuestionAnswering"
    ours = "TFastForQuestionAnswering"

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield text_of(row, "question", self.name)
            yield text_of(row, "context", self.name)

    def examples(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: TaskDataArguments, config: Any
    ) -> Examples:
        found = Examples([], list(rows), row_of=[])
        paired = len(tokenizer("a", "b")["input_ids"]) > len(tokenizer("a")["input_ids"])
        if not paired:
            raise ValueError("question answering needs a tokenizer that takes two texts; learned ones do: --tokenizer")
        for n, row in enumerate(rows):
            question, context = text_of(row, "question", self.name), text_of(row, "context", self.name)
            answers = read_answers(row["answers"], f"row {n}")
            for text, start in answers[:1]:
                if context[start : start + len(text)] != text:
                    raise ValueError(f"row {n}: {text!r} does not stand at character {start} of its context")
            size = len(tokenizer(question, add_special_tokens=False)["input_ids"])
            if size > data.source_length // 2:
                raise ValueError(
                    f"row {n}: a question of {size} tokens leaves no room for its context in {data.source_length}; "
                    "raise --source_length"
                )
            coded = tokenizer(
                question.strip(), context, truncation="only_second", max_length=data.source_length,
                stride=min(data.stride, data.source_length // 4), return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )  # fmt: skip
            for piece, offsets in enumerate(coded["offset_mapping"]):
                names = [name for name in tokenizer.model_input_names if name in coded]
                feature = {name: coded[name][piece] for name in names}
                inside = [k for k, part in enumerate(coded.sequence_ids(piece)) if part == 1]
                span = _span(answers[0], offsets, inside)
                feature |= {"start_positions": span[0], "end_positions": span[1]}
                found.features.append(feature)
                found.row_of.append(n)  # type: ignore[union-attr]
                found.extra.append((offsets, set(inside)))
        return found

    def score(self, predictions: Any, examples: Examples) -> dict[str, float]:
        from ...metrics import load

        references = [[text for text, _ in read_answers(row["answers"], "a row")] for row in examples.rows]
        return dict(
            load("exact_match").compute(predictions=self.answers(predictions, examples), references=references)
        )

    def answers(self, predictions: Any, examples: Examples) -> list[Any]:
        """The text of the best span of every row."""
        begins, ends = predictions
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples.rows)
        for n, (row, (offsets, inside)) in enumerate(zip(examples.row_of or [], examples.extra, strict=True)):
            context = examples.rows[row]["context"]
            start, end = begins[n][: len(offsets)], ends[n][: len(offsets)]
            for i in np.argsort(-start)[:BEST]:
                for j in np.argsort(-end)[:BEST]:
                    if i in inside and j in inside and i <= j < i + LONGEST and start[i] + end[j] > best[row][0]:
                        best[row] = (float(start[i] + end[j]), context[offsets[i][0] : offsets[j][1]])
        return [text for _, text in best]


def read_answers(given: Any, where: str) -> list[tuple[str, int]]:
    """[(text, character it begins at), ...]. ValueError where there is none, or the form is another."""
    if isinstance(given, dict) and "text" in given and "answer_start" in given:
        given = [{"text": t, "answer_start": s} for t, s in zip(given["text"], given["answer_start"], strict=True)]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} has no answer; questions without one are not trained here: leave such rows out")
    try:
        return [(str(one["text"]), int(one["answer_start"])) for one in given]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: answers have text and answer_start, got {str(given)[:60]}") from None


def _span(answer: tuple[str, int], offsets: list[tuple[int, int]], inside: list[int]) -> tuple[int, int]:
    """First and last token of an answer, or (0, 0) where this piece does not hold it whole."""
    text, start = answer
    end = start + len(text)
    covered = [k for k in inside if offsets[k][0] < end and offsets[k][1] > start]
    whole = covered and offsets[covered[0]][0] <= start and offsets[covered[-1]][1] >= end
    return (covered[0], covered[-1]) if whole else (0, 0)
