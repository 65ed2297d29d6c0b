"""Mean reciprocal rank and recall of the right document."""

from typing import Any

import datasets
import numpy as np

from ._base import Metric


class Retrieval(Metric):
    """predictions: for every query its scores of all documents. references: the number of the right one, from 0."""

    description_text = "MRR: mean of 1 / rank of the right document. recall_at_k: share of ranks up to k."
    source = "Voorhees, TREC-8, https://trec.nist.gov/pubs/trec8/papers/qa_report.pdf"
    kinds = (datasets.Sequence(datasets.Value("float64")), datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any, recall_at: Any = (1, 5, 10)) -> dict[str, float]:
        """recall_at: the k's. Documents with the same score as the right one come before it, so that a model that
        scores everything alike finds nothing."""
        ranks = []
        for n, (scores, right) in enumerate(zip(predictions, references, strict=True)):
            scores = np.asarray(scores, dtype=np.float64)
            if not 0 <= right < len(scores):
                raise ValueError(f"query {n}: the right document is {right}, and there are scores of {len(scores)}")
            if not np.isfinite(scores).all():
                raise ValueError(f"query {n}: some scores are not finite")
            ranks.append(int((scores >= scores[right]).sum()))
        found = np.asarray(ranks)
        return {"mrr": float((1 / found).mean())} | {f"recall_at_{k}": float((found <= k).mean()) for k in recall_at}
