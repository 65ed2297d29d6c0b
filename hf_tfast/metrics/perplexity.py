"""Perplexity of texts whose losses are known."""

import math
from typing import Any

import datasets

from ._base import Metric


class Perplexity(Metric):
    """predictions: the nats of each text (its negative log-likelihood). references: of how many tokens."""

    description_text = "exp of all nats over all tokens: long texts count by their length."
    source = "Jelinek et al., 1977, https://doi.org/10.1121/1.2016299"
    kinds = (datasets.Value("float64"), datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """predictions: nats of each text; references: tokens of each text."""
        tokens = int(sum(references))
        if tokens < 1 or min(references) < 0:
            raise ValueError(f"perplexity needs token counts of at least 1 in all, none negative; got {tokens} in all")
        loss = math.fsum(predictions) / tokens
        if not math.isfinite(loss):
            raise ValueError(f"the nats are not finite: their mean is {loss}")
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "nats_per_token": loss}
