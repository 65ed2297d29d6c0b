"""Loss of held-out sequences, token by token: in all, by how far back a token last occurred, and in bits per byte."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .occurrences import CLASSES, classes_of
from .packing import IGNORED, PackedRows, collate


@dataclass
class Sums:
    """Of the targets of every class (in the order of CLASSES): nats, how many, how many guessed right, their bytes."""

    nats: Tensor = field(default_factory=lambda: torch.zeros(len(CLASSES), dtype=torch.float64))
    targets: Tensor = field(default_factory=lambda: torch.zeros(len(CLASSES), dtype=torch.float64))
    right: Tensor = field(default_factory=lambda: torch.zeros(len(CLASSES), dtype=torch.float64))
    bytes: Tensor = field(default_factory=lambda: torch.zeros(len(CLASSES), dtype=torch.float64))

    def add(self, kinds: Tensor, nats: Tensor, right: Tensor, sizes: Tensor) -> None:
        """Targets [t] with their classes, losses, hits and bytes."""
        for name, values in (("nats", nats), ("right", right), ("bytes", sizes), ("targets", torch.ones_like(nats))):
            total = getattr(self, name)
            total.index_add_(0, kinds.cpu().long(), values.double().cpu())

    def tensor(self) -> Tensor:
        """[4 classes] float64, for a sum over processes."""
        return torch.stack([self.nats, self.targets, self.right, self.bytes])

    @classmethod
    def of(cls, tensor: Tensor) -> "Sums":
        return cls(*tensor.unbind(0))

    def metrics(self, prefix: str = "eval", two_way: bool = False) -> dict[str, float]:
        """loss (nats a target), perplexity, and the loss of every class that has targets, with its share of targets.

        Causal models also have bits_per_byte: all bits over the bytes of the targets' text; the end of a document
        costs bits and has no bytes. Two-way models have the accuracy of what was hidden.
        """
        count = float(self.targets.sum())
        if not count:
            raise ValueError("the evaluation has no targets: no token of the held-out sequences has to be predicted")
        loss = float(self.nats.sum()) / count
        found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if two_way:
            found["accuracy"] = float(self.right.sum()) / count
        elif float(self.bytes.sum()):
            found["bits_per_byte"] = float(self.nats.sum()) / math.log(2) / float(self.bytes.sum())
        for n, name in enumerate(CLASSES):
            if float(self.targets[n]):
                found[f"loss_{name}"] = float(self.nats[n] / self.targets[n])
            found[f"share_{name}"] = float(self.targets[n]) / count
        found["targets"] = count
        return {f"{prefix}_{name}": value for name, value in found.items()}


class Evaluation:
    """Held-out sequences, their classes, and how to score a model on them.

    rows   a data set of `packing` or `masking`.
    far    the distance beyond which a token is far (see `occurrences`); unit: tokens of one occurrence.
    sizes  [vocabulary] bytes of every token, or None where the tokenizer does not say.
    """

    def __init__(self, rows: PackedRows, far: int, unit: int, sizes: Tensor | None = None, batch: int = 1) -> None:
        if not len(rows):
            raise ValueError("there are no held-out sequences to evaluate on")
        self.rows, self.batch, self.two_way = rows, batch, rows.two_way
        self.kinds = classes_of(rows, far, unit)
        self.sizes = sizes

    @torch.no_grad()
    def sums(
        self, model: Any, *, rank: int = 0, world: int = 1, context: AbstractContextManager[Any] | None = None
    ) -> Sums:
        """This process's share of the sequences. Every process runs equally many batches, as sharded models need."""
        total, was_training = Sums(), model.training
        model.eval()
        try:
            with context or nullcontext():
                for indices, counted in self._batches(rank, world):
                    self._add(total, model, indices, counted)
        finally:
            model.train(was_training)
        return total

    def _batches(self, rank: int, world: int) -> Iterator[tuple[list[int], int]]:
        """(rows, how many of them count): the last batches repeat a row where a process has none left."""
        mine = list(range(rank, len(self.rows), world))
        most = -(-len(self.rows) // world)
        padded = [*mine, *[0] * (most - len(mine))]
        for start in range(0, most, self.batch):
            yield padded[start : start + self.batch], max(min(len(mine) - start, self.batch), 0)

    def _add(self, total: Sums, model: Any, indices: list[int], counted: int) -> None:
        device = next(model.parameters()).device
        batch = {name: x.to(device) for name, x in collate([self.rows[n] for n in indices]).items()}
        labels = batch.pop("labels")
        logits = model(**batch, **({} if self.two_way else {"use_cache": False})).logits
        kinds = self.kinds[indices]
        if not self.two_way:  # a token is predicted by the one before it
            logits, labels, kinds = logits[:, :-1], labels[:, 1:], kinds[:, 1:]
        for row in range(counted):
            chosen = labels[row] != IGNORED
            scores, wanted = logits[row][chosen].float(), labels[row][chosen]
            nats = F.cross_entropy(scores, wanted, reduction="none")
            bytes_of = torch.zeros_like(nats) if self.sizes is None else self.sizes.to(device)[wanted]
            total.add(kinds[row].to(device)[chosen], nats, scores.argmax(-1) == wanted, bytes_of)
