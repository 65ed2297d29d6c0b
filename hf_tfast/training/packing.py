"""Documents into sequences of one length, with nothing lost and no document reading another.

Documents follow each other without padding between them and are cut where a sequence ends, so a sequence holds pieces
of documents. A piece is a segment: its positions start at 0 again, and `position_ids` that restart are how attention
tells pieces apart, as long as there is no attention_mask and no cache (TFast models read them in both directions,
Transformers' own in causal models only).

Padding exists at the end of the last sequence alone and is a segment of its own. A piece's first token has nothing to
be predicted from and is no target of a causal model: of whole documents that is the begin token, of a document that
was cut one real token per cut; `Report` counts them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class Report:
    """What packing made of the documents, in tokens; `unpredicted` are text tokens that begin a piece."""

    documents: int
    empty: int
    tokens: int
    sequences: int
    pieces: int
    padding: int
    unpredicted: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Packed:
    """ids and positions [n length] int32; the last `report.padding` tokens are padding."""

    ids: Tensor
    positions: Tensor
    report: Report

    @property
    def segments(self) -> Tensor:
        """[n length] int64: number of the piece within its sequence, from 1; padding is the last."""
        return (self.positions == 0).cumsum(-1)

    @property
    def real(self) -> Tensor:
        """[n length] bool: not padding."""
        flat = torch.ones(self.ids.numel(), dtype=torch.bool)
        flat[self.report.tokens :] = False
        return flat.view_as(self.ids)

    def first(self, count: int | None) -> "Packed":
        """The first `count` sequences; the report still tells of all. All where there are no more than that."""
        if count is None or count >= len(self.ids):
            return self
        return Packed(self.ids[:count], self.positions[:count], self.report)


def pack(documents: Sequence[Sequence[int]], length: int, pad: int) -> Packed:
    """Documents (token ids, begin and end included) in the order given -> sequences of `length`.

    ValueError where there are no tokens, or a length below 2, with which nothing can be predicted.
    """
    if length < 2:
        raise ValueError(f"a sequence holds at least 2 tokens, got length {length}")
    full = [document for document in documents if len(document)]
    if not full:
        raise ValueError(f"there are no tokens to pack: all of the {len(documents)} documents are empty")
    sizes = np.array([len(document) for document in full])
    tokens = int(sizes.sum())
    n = -(-tokens // length)
    padding = n * length - tokens
    ids = np.full(n * length, pad, dtype=np.int32)
    ids[:tokens] = np.concatenate([np.asarray(document, dtype=np.int32) for document in full])
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    begins = np.unique(np.concatenate([starts, np.arange(0, tokens, length), [tokens] if padding else []]).astype(int))
    positions = np.arange(n * length)
    positions -= np.repeat(begins, np.diff(np.append(begins, n * length)))
    pieces = len(begins) - bool(padding)
    report = Report(
        documents=len(full),
        empty=len(documents) - len(full),
        tokens=tokens,
        sequences=n,
        pieces=pieces,
        padding=padding,
        unpredicted=pieces - len(full),
    )
    rows = [torch.from_numpy(x.astype(np.int32)).view(n, length) for x in (ids, positions)]
    return Packed(rows[0], rows[1], report)


class PackedRows(Dataset[dict[str, Tensor]]):
    """The sequences for a causal model: input_ids, position_ids and labels, [length] int64 each."""

    two_way = False

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.real = packed.real

    def __len__(self) -> int:
        return len(self.packed.ids)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids, positions = self.packed.ids[n].long(), self.packed.positions[n].long()
        labels = ids.where((positions > 0) & self.real[n], IGNORED)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: every field [b length]."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
