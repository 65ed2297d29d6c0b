"""Which documents cross the borders between ranks, and who needs which of their tokens.

Every rank holds a slice [b n] of the rows. A document is one run of slots with one number; numbers grow along a row, 0
is padding. What ranks tell each other of their slices is eight integers per row, whatever the length: the rest follows
from these, on every rank alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sequence_wire import Wire

__all__ = ["Document", "Holder", "Piece", "Rows", "Transfer"]


@dataclass(frozen=True)
class Holder:
    """A rank that holds `count` tokens of a document, from position `first` on, in its slots from `slot` on."""

    rank: int
    first: int
    count: int
    slot: int

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class Document:
    """A document that crosses a border. rows: the rows of the batch that it stands for (all, where all are alike)."""

    rows: slice
    piece: int
    holders: tuple[Holder, ...]

    @property
    def length(self) -> int:
        return self.holders[-1].end

    def of(self, rank: int) -> Holder | None:
        return next((h for h in self.holders if h.rank == rank), None)


@dataclass(frozen=True)
class Piece:
    """A run of this rank's slots in one row: a document of its own, part of a crossing one, or padding (number 0).

    number  how many runs of the whole row come before: draws of dropout depend on it.
    """

    row: int
    slots: slice
    number: int
    padding: bool
    crossing: int | None = None  # index in Rows.crossing


@dataclass(frozen=True)
class Transfer:
    """Tokens on their way, as rows of [b * n, ..]. places: of each crossing document the tokens received for it, as
    (before, behind): [rows of the document, tokens] places in what is received, in the order of their positions."""

    sends: dict[int, Tensor]
    receives: dict[int, int]
    places: dict[int, tuple[Tensor, Tensor]]


@dataclass
class Rows:
    """The documents of a batch of slices. whole: every row, on all ranks together, is one document without padding."""

    rank: int
    size: int
    batch: int
    slots: int
    length: int
    whole: bool
    pieces: list[list[Piece]]
    crossing: list[Document]
    device: torch.device
    transfers: dict[tuple[int, int, int], Transfer] = field(default_factory=dict)

    @classmethod
    def of(cls, documents: Tensor, wire: Wire) -> "Rows":
        """documents [b n] int64. Every rank calls this, and all raise the same ValueError for rows that no rank could
        have: documents with holes in them, or numbers that do not grow."""
        if documents.shape[1] == 0:
            raise ValueError("a rank holds no token of the sequence: use fewer ranks, or longer sequences")
        runs = [_runs(row) for row in documents]
        told = wire.gather(torch.tensor([_told(row) for row in runs], device=documents.device)).tolist()
        batch, slots = documents.shape
        crossing: list[Document] = []
        pieces: list[list[Piece]] = []
        # one run on every rank is not enough: a document may end just where a slice does
        whole = all(row[_RUNS] == 1 and row[_FIRST] == first[_FIRST] > 0
                    for rank in told for row, first in zip(rank, told[0], strict=True))  # fmt: skip
        for b in range(batch):
            found, numbers = _follow([rank[b] for rank in told], b)
            mine, start = [], 0
            for n, (number, count) in enumerate(runs[b]):
                index = next((i for i, d in enumerate(found) if (h := d.of(wire.rank)) and h.slot == start), None)
                mine.append(
                    Piece(
                        row=b,
                        slots=slice(start, start + count),
                        number=numbers[wire.rank] + n,
                        padding=number == 0,
                        crossing=None if index is None else len(crossing) + index,
                    )
                )
                start += count
            pieces.append(mine)
            crossing += found
        if whole and batch > 1 and wire.size > 1:
            crossing = [Document(slice(0, batch), crossing[0].piece, crossing[0].holders)]
        length = sum(rank[0][_SLOTS] for rank in told)
        return cls(wire.rank, wire.size, batch, slots, length, whole, pieces, crossing, documents.device)

    def transfer(self, before: int, behind: int, firsts: int) -> Transfer:
        """Who sends what, where every rank needs of a document that crosses its borders the `before` tokens before
        its own, the `behind` tokens behind them, and the `firsts` first ones."""
        key = (before, behind, firsts)
        if key not in self.transfers:
            self.transfers[key] = self._plan(*key)
        return self.transfers[key]

    def _plan(self, before: int, behind: int, firsts: int) -> Transfer:
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, int] = {}
        wanted: list[tuple[int, int, int, Tensor]] = []  # need, sender, document, places among what the sender sends
        for index, document in enumerate(self.crossing):
            rows = torch.arange(self.batch, device=self.device)[document.rows, None] * self.slots
            for to in document.holders:
                for need, (low, high) in enumerate(_needs(to, document.length, before, behind, firsts)):
                    for h in document.holders:
                        first, last = max(low, h.first), min(high, h.end)
                        if h.rank == to.rank or first >= last:
                            continue
                        if h.rank == self.rank:
                            at = torch.arange(first, last, device=self.device) - h.first + h.slot
                            sends.setdefault(to.rank, []).append((rows + at).flatten())
                        if to.rank == self.rank:
                            done, count = receives.get(h.rank, 0), len(rows) * (last - first)
                            here = torch.arange(done, done + count, device=self.device).view(len(rows), -1)
                            wanted.append((need, h.rank, index, here))
                            receives[h.rank] = done + count
        starts = {rank: sum(n for r, n in receives.items() if r < rank) for rank in receives}
        places = {}
        for index, document in enumerate(self.crossing):
            if document.of(self.rank) is None:
                continue
            none = torch.empty(len(range(self.batch)[document.rows]), 0, dtype=torch.int64, device=self.device)
            ordered = sorted((w for w in wanted if w[2] == index), key=lambda w: w[:2])
            parts = [(need, here + starts[rank]) for need, rank, _, here in ordered]
            front = [none, *(here for need, here in parts if need < BEHIND)]
            places[index] = torch.cat(front, 1), torch.cat([none, *(x for n, x in parts if n == BEHIND)], 1)
        return Transfer({r: torch.cat(rows) for r, rows in sends.items()}, receives, places)


BEHIND = 2  # the last of the needs of `_needs`
_SLOTS, _RUNS, _FIRST, _FIRST_COUNT, _LAST, _LAST_COUNT, _LOWEST, _HIGHEST = range(8)


def _runs(row: Tensor) -> list[tuple[int, int]]:
    numbers, counts = row.unique_consecutive(return_counts=True)
    return list(zip(numbers.tolist(), counts.tolist(), strict=True))


def _told(runs: list[tuple[int, int]]) -> list[int]:
    """What the others learn of a row's slice; a lowest number above the highest says that it is malformed."""
    numbers = [number for number, _ in runs if number]
    grow = all(x < y for x, y in zip(numbers, numbers[1:], strict=False)) and min(numbers, default=1) > 0
    ends = ((numbers[0], numbers[-1]) if numbers else (0, 0)) if grow else (1, -1)
    return [sum(count for _, count in runs), len(runs), *runs[0], *runs[-1], *ends]


def _follow(told: list[list[int]], row: int) -> tuple[list[Document], list[int]]:
    """The crossing documents of one row, and for every rank how many runs of the row begin before its first one."""
    found: list[list[Holder]] = []
    pieces: list[int] = []
    numbers: list[int] = []
    runs, open_document, highest = 0, -1, 0  # runs begun so far, the number of the last one
    for rank, one in enumerate(told):
        slots, count, first, first_count, last, last_count, low, high = one
        continued = rank > 0 and first == open_document
        if low > high or (low and low < highest) or (low and low == highest and not (continued and first == low)):
            raise ValueError(
                f"row {row}: documents must be runs of slots whose numbers grow along the row; a mask with holes in a "
                "document, or documents that interleave, cannot be cut over ranks: put padding at the ends of "
                "documents, or run the sequence in one process"
            )
        numbers.append(runs - continued)
        if continued and first:
            before = found[-1][-1].end
            found[-1].append(Holder(rank, before, first_count, 0))
        elif first:
            found.append([Holder(rank, 0, first_count, 0)])
            pieces.append(runs)
        runs += count - continued
        if count > 1 and last:
            found.append([Holder(rank, 0, last_count, slots - last_count)])
            pieces.append(runs - 1)
        open_document, highest = last, max(highest, high)
    rows = slice(row, row + 1)
    return [Document(rows, piece, tuple(h)) for piece, h in zip(pieces, found, strict=True) if len(h) > 1], numbers


def _needs(h: Holder, length: int, before: int, behind: int, firsts: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions that a holder wants beside its own: the first ones, those before, those behind."""
    low = max(h.first - before, 0)
    yield 0, min(firsts, low)
    yield low, h.first
    yield h.end, min(h.end + behind, length)
