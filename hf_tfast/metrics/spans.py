"""Entity F1 of token labels: a span counts when its borders and its kind are right."""

from collections.abc import Sequence
from typing import Any

from ._base import TEXTS, Metric
from .f1 import f1


class Spans(Metric):
    """predictions and references: for every text the list of its tokens' labels, O, B-KIND or I-KIND."""

    description_text = "F1, precision and recall of labelled spans over a corpus, and the accuracy of single labels."
    source = "Tjong Kim Sang and De Meulder, CoNLL-2003, section 3, https://aclanthology.org/W03-0419/"
    kinds = (TEXTS, TEXTS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """An I- that does not go on from a span of its kind begins one, as conlleval reads it."""
        right = said = true = same = labels = 0
        for n, (p, r) in enumerate(zip(predictions, references, strict=True)):
            if len(p) != len(r):
                raise ValueError(f"text {n} has {len(p)} predicted labels for {len(r)} tokens")
            found, wanted = set(spans(p)), set(spans(r))
            right, said, true = right + len(found & wanted), said + len(found), true + len(wanted)
            same, labels = same + sum(a == b for a, b in zip(p, r, strict=True)), labels + len(r)
        score, precision, recall = f1(right, said, true)
        return {"f1": score, "precision": precision, "recall": recall, "accuracy": same / max(labels, 1)}


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first, last) of every span. ValueError for labels that are not O, B-KIND or I-KIND."""
    found: list[tuple[str, int, int]] = []
    open_kind: str | None = None
    for n, label in enumerate(labels):
        mark, _, kind = label.partition("-")
        if label != "O" and (mark not in ("B", "I") or not kind):
            raise ValueError(f"token labels are O, B-KIND or I-KIND, got {label!r}")
        if label == "O":
            open_kind = None
        elif mark == "I" and kind == open_kind:
            found[-1] = (kind, found[-1][1], n)
        else:
            found.append((kind, n, n))
            open_kind = kind
    return found


__all__ = ["Spans", "spans"]
