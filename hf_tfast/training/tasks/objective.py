"""The loss of every task in one form: scores [b t c] against labels [b t], of which -100 never counts.

    loss = sum over (b, t) of nats / number of labels

The number is counted over the whole step: all batches that are accumulated and all processes. So gradients do not
depend on how a step is cut into batches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..packing import IGNORED

__all__ = ["LABELS", "count", "nats", "r_drop", "scores_and_labels", "twice"]

LABELS = ("labels", "start_positions", "end_positions")


def scores_and_labels(kind: str, outputs: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(scores [b t c], labels [b t]) of an output.

    kind  "tokens": a label each; "next": each predicts the one after it; "class": a label a row; "span": the
          beginning and the end of an answer, t = 2, c = tokens.
    """
    if kind == "span":
        scores = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        return scores, torch.stack([given["start_positions"], given["end_positions"]], dim=1)
    if kind == "class":
        return outputs.logits[:, None], given["labels"][:, None]
    if kind == "next":
        return outputs.logits[:, :-1], given["labels"][:, 1:]
    return outputs.logits, given["labels"]


def count(kind: str, given: Mapping[str, Tensor]) -> Tensor:
    """How many labels of a batch count; [] int64."""
    if kind == "span":
        return torch.tensor(2 * len(given["start_positions"]), device=given["start_positions"].device)
    labels = given["labels"][:, 1:] if kind == "next" else given["labels"]
    return (labels != IGNORED).sum()


def nats(scores: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy [b t] in at least float32, zero where the label is -100.

    smoothing  the target is (1 - smoothing) on the label and smoothing / c on every class (Szegedy et al., section 7,
               https://arxiv.org/abs/1512.00567).
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    flat = F.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
    )
    return flat.view_as(labels)


def twice(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every row again behind the others: [b ..] -> [2b ..]."""
    return {name: torch.cat([x, x]) for name, x in given.items()}


def r_drop(scores: Tensor, labels: Tensor) -> Tensor:
    """R-Drop of scores [2b t c] of the same rows, twice: [b t], zero where the label is -100.

        (KL(p || q) + KL(q || p)) / 4

    Liang et al., "R-Drop", equation 3, https://arxiv.org/abs/2106.14448, halved as the two cross-entropies are here,
    which are averaged where the paper adds them.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    p, q = wide.chunk(2)
    both = ((p.exp() - q.exp()) * (p - q)).sum(-1)  # KL(p||q) + KL(q||p)
    return both.masked_fill(labels.chunk(2)[0] == IGNORED, 0.0) / 4
