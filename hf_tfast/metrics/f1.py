"""F1, precision and recall of classes."""

from collections import Counter
from typing import Any

from ._base import TEXT, Metric
from .accuracy import CLASS

AVERAGES = ("macro", "micro", "weighted")


class F1(Metric):
    """predictions and references: classes, as numbers or as names."""

    description_text = "The harmonic mean of precision and recall, over classes that are predicted or true somewhere."
    source = "van Rijsbergen, Information Retrieval, 1979, chapter 7"
    kinds = ((CLASS, CLASS), (TEXT, TEXT))

    def _compute(self, predictions: Any, references: Any, average: str = "macro") -> dict[str, float]:
        """average: macro (every class alike), micro (every row alike), weighted (classes by how often they are true).

        A class that is never predicted has precision 0, one that is never true has recall 0.
        """
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
        right: Counter[Any] = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
        said, true = Counter(predictions), Counter(references)
        if average == "micro":
            share = sum(right.values()) / len(references)
            return {"f1": share, "precision": share, "recall": share}
        classes = sorted({*said, *true})
        weights = [true[c] / len(references) if average == "weighted" else 1 / len(classes) for c in classes]
        found = [f1(right[c], said[c], true[c]) for c in classes]
        names = ("f1", "precision", "recall")
        return {name: sum(w * one[n] for w, one in zip(weights, found, strict=True)) for n, name in enumerate(names)}


def f1(right: int, said: int, true: int) -> tuple[float, float, float]:
    """(F1, precision, recall) from how many were right, said and true; 0 where there were none."""
    precision, recall = right / said if said else 0.0, right / true if true else 0.0
    return 2 * right / (said + true) if said + true else 0.0, precision, recall
