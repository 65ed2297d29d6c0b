"""How sharply a model attends: what random features and landmarks can follow, and what only chosen keys can.

    keys    exp(entropy) of a query's weights, the number of keys among which it divides its attention; the mean over
            heads and queries
    norm    mean of scale |q|^2 and scale |k|^2. The error of Performer's features grows like exp(scale |q + k|^2 / 2):
            at norms of some tens no number of features helps, and such a student has to learn other queries and keys

Source: Choromanski et al., "Rethinking Attention with Performers", lemma 2 (variance),
https://arxiv.org/abs/2009.14794
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..benchmarking.captured import Call, heard, listening
from ..benchmarking.fidelity import weights

__all__ = ["sharpness"]

QUERIES = 128  # of a row, evenly from all of it


@torch.no_grad()
def sharpness(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Any]]:
    """{"layer", "keys", "norm"} of every self-attention layer on one row of ids [1 n].

    ValueError for models whose attention does not go through Transformers' interface.
    """
    found: list[dict[str, Any]] = []

    def measure(call: Call) -> None:
        j, scale = call.k.shape[2], call.score.factor(call.q.shape[-1])
        few = torch.linspace(0, j - 1, min(QUERIES, j), device=call.q.device).long()
        before = torch.arange(j, device=call.q.device) <= few[:, None] if call.causal else torch.ones(
            len(few), j, dtype=torch.bool, device=call.q.device
        )  # fmt: skip
        shares = weights(call, few, before).double()
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        norm = (call.q.double().square().sum(-1).mean() + call.k.double().square().sum(-1).mean()) / 2
        found.append({"layer": call.layer, "keys": float(entropy.exp().mean()), "norm": float(norm * abs(scale))})

    training = model.training
    model.eval()
    try:
        with heard(model), listening(model, measure):
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        model.train(training)
    return sorted(found, key=lambda one: one["layer"])
