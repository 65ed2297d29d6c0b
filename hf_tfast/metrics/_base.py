"""What the metrics share: features, and checks that name what is wrong."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

__all__ = ["TEXT", "TEXTS", "Metric"]

TEXT, TEXTS = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))


class Metric(evaluate.Metric):
    """A metric whose texts are attributes: description, source, and what predictions and references are."""

    description_text = ""
    source = ""
    kinds: tuple[Any, Any] = (TEXT, TEXT)  # of one prediction and one reference; or several such pairs

    def _info(self) -> evaluate.MetricInfo:
        pairs = self.kinds if isinstance(self.kinds[0], tuple) else (self.kinds,)
        features = [datasets.Features({"predictions": p, "references": r}) for p, r in pairs]
        return evaluate.MetricInfo(
            description=self.description_text,
            citation=self.source,
            inputs_description=(type(self)._compute.__doc__ or "").strip(),
            features=features if len(features) > 1 else features[0],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> dict[str, Any]:
        """As evaluate.Metric.compute; ValueError where there is nothing to score, or lengths differ."""
        if predictions is not None or references is not None:
            check_lengths(type(self).__name__, predictions, references)
        found: dict[str, Any] | None = super().compute(predictions=predictions, references=references, **options)
        if found is None:
            raise RuntimeError(f"{type(self).__name__} was computed on a process that is not the main one")
        return found


def check_lengths(name: str, predictions: Any, references: Any) -> None:
    if predictions is None or references is None:
        raise ValueError(f"{name} needs both predictions and references")
    if len(predictions) != len(references):
        raise ValueError(f"{name}: {len(predictions)} predictions for {len(references)} references")
    if not len(predictions):
        raise ValueError(f"{name}: there is nothing to score, predictions are empty")


def several(references: Sequence[Any]) -> list[list[str]]:
    """A reference each, or a list of them -> lists; ValueError for a row without any."""
    found = [[one] if isinstance(one, str) else list(one) for one in references]
    if (empty := next((n for n, one in enumerate(found) if not one), None)) is not None:
        raise ValueError(f"row {empty} has no reference")
    return found
