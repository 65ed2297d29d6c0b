"""Accuracy: the share of predictions that are right."""

from typing import Any

import datasets

from ._base import TEXT, Metric

CLASS = datasets.Value("int64")


class Accuracy(Metric):
    """predictions and references: classes, as numbers or as names."""

    description_text = "The share of predictions that equal their reference."
    kinds = ((CLASS, CLASS), (TEXT, TEXT))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """predictions, references: classes."""
        right = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"accuracy": float(right) / len(references)}
