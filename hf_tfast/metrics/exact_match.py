"""Exact match and token F1 of answers, as SQuAD counts them."""

import re
import string
from collections import Counter
from typing import Any

from ._base import TEXT, TEXTS, Metric, several


class ExactMatch(Metric):
    """predictions: texts. references: a text each, or a list of right answers, of which the best one counts."""

    description_text = "The share of answers that equal a right one, and the F1 of their words."
    source = "Rajpurkar et al., SQuAD, section 6.1, https://arxiv.org/abs/1606.05250"
    kinds = ((TEXT, TEXT), (TEXT, TEXTS))

    def _compute(self, predictions: Any, references: Any, normalize: bool = True) -> dict[str, float]:
        """normalize: without case, punctuation, articles (a, an, the) and repeated spaces."""
        change = normalized if normalize else str.strip
        same = shared = 0.0
        for prediction, ones in zip(predictions, several(references), strict=True):
            said, right = change(prediction), [change(one) for one in ones]
            same += said in right
            shared += max(_overlap(said.split(), one.split()) for one in right)
        return {"exact_match": same / len(predictions), "f1": shared / len(predictions)}


def normalized(text: str) -> str:
    """Without case, punctuation, articles and repeated spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))
