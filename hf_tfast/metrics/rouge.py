"""ROUGE-1, -2, -L and -Lsum, as rouge-score computes them."""

from typing import Any

from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped, unused-ignore]

from ._base import TEXT, TEXTS, Metric, several

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(Metric):
    """predictions: texts. references: a text each, or a list of them, of which the best one counts for each type."""

    description_text = "F1 of n-grams (ROUGE-1, ROUGE-2) and of the longest common subsequence (ROUGE-L), 0 to 1."
    source = "Lin, 2004, https://aclanthology.org/W04-1013/"
    kinds = ((TEXT, TEXT), (TEXT, TEXTS))

    def _compute(self, predictions: Any, references: Any, use_stemmer: bool = True) -> dict[str, float]:
        """predictions: texts; references: one or several texts each; use_stemmer: Porter's, as is usual."""
        scorer = RougeScorer(list(TYPES), use_stemmer=use_stemmer)
        total = dict.fromkeys(TYPES, 0.0)
        for prediction, ones in zip(predictions, several(references), strict=True):
            found = scorer.score_multi(ones, prediction)
            for name in TYPES:
                total[name] += found[name].fmeasure
        return {name: value / len(predictions) for name, value in total.items()}
