"""Position encodings that are added to word embeddings: sinusoidal, learned, low-rank.

    forward(position_ids [b i] integer, dtype) -> [b i hidden]

One rule for all: a position below 0 is no position (padding, say) and gets zeros. Rotary positions turn queries and
keys instead, through Transformers' own utilities, and have no module here.

Source   sinusoids: Vaswani et al., "Attention Is All You Need", section 3.5, https://arxiv.org/abs/1706.03762
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..attention._base import whole

__all__ = [
    "LearnedPositions",
    "LowRankPositions",
    "Positions",
    "SinusoidalPositions",
    "make_positions",
    "sinusoidal_rank",
    "sinusoids",
]

BASE = 10000.0
LARGEST_TABLE = 2**26
"""Elements that a table of sinusoids may have: 256 MiB, 87381 positions of 768 channels."""
RANK = 64
"""Of a low-rank table whose config says neither rank nor error, or the table's own where that is less."""
SMALLEST_ERROR = 1e-6  # fp32 factors, and squared singular values in float64, are not better

_CHUNK = 2**20  # elements that are computed in float64 at a time


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """The formula, in float64: positions [..] -> [.. width], sin(p / 10000^(2n / width)) in channel 2n and the cosine
    of the same angle in channel 2n + 1. (fp32 knows the angle of position 999999 to 0.06 only, float64 to 1e-10.)"""
    even = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * BASE ** (-even / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


class Positions(nn.Module):
    """What the encodings share: the check of position_ids, and zeros for those below 0."""

    unit = False  # are the values of the size of sinusoids, to which word embeddings are scaled up?

    def initialize(self, std: float) -> None:
        """First values of what no checkpoint gave; asked by a model's `_init_weights`."""

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[b i] integer -> [b i hidden] in `dtype`. ValueError for floats and for positions past a table's end."""
        if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
            raise ValueError(f"position_ids are integers, got {position_ids.dtype}")
        if torch.compiler.is_compiling() or position_ids.is_meta:  # the graph must not depend on the content
            rows = self.rows(position_ids.clamp(min=0), None, dtype)
            return rows.masked_fill((position_ids < 0)[..., None], 0.0)
        if not position_ids.numel():
            return self.rows(position_ids, 0, dtype)
        lowest, highest = (int(x) for x in position_ids.aminmax())
        if lowest >= 0:
            return self.rows(position_ids, highest, dtype)
        rows = self.rows(position_ids.clamp(min=0), max(highest, 0), dtype)
        return rows.masked_fill((position_ids < 0)[..., None], 0.0)

    def rows(self, position_ids: Tensor, highest: int | None, dtype: torch.dtype) -> Tensor:
        """The rows of positions from 0 to `highest` (None: unknown, in a compiled graph)."""
        raise NotImplementedError


class SinusoidalPositions(Positions):
    """Sinusoids for any position, from a table of fp32 that is computed once, in float64, for `length` positions.

    The table is a buffer that is not saved. It is no part of any state: it stays fp32 in a model of another dtype, and
    is computed anew wherever it lands (`.to`, `.half`, `to_empty`, `from_pretrained` on the meta device).

    Positions past the table: a call that asks for at least as many positions as are missing doubles the table (which
    is then kept beside the buffer, so that ranks of unequal lengths can still synchronise buffers), up to
    LARGEST_TABLE elements. Everything else is computed from the formula, for the asked positions alone: one position
    of 999999 costs one row. So does a lookup in float64, and a compiled graph, which cannot look at the content.
    """

    unit = True
    table: Tensor

    def __init__(self, hidden_size: int, length: int = 2048) -> None:
        super().__init__()
        whole("hidden_size", hidden_size, 1)
        whole("length", length, 1)
        self.hidden_size, self.length = hidden_size, length
        self.longer: Tensor | None = None
        self.register_buffer("table", self._first_rows(min(length, self.most)), persistent=False)

    @property
    def most(self) -> int:
        """Positions that a table may hold."""
        return max(LARGEST_TABLE // self.hidden_size, 1)

    def initialize(self, std: float) -> None:
        init.copy_(self.table, self._first_rows(len(self.table), self.table.device))

    def rows(self, position_ids: Tensor, highest: int | None, dtype: torch.dtype) -> Tensor:
        if highest is None:
            return sinusoids(position_ids, self.hidden_size).to(dtype)
        table = None if dtype == torch.float64 else self._table(position_ids.device, highest + 1, position_ids.numel())
        if table is not None:
            return table[position_ids].to(dtype)
        return _computed(position_ids, self.hidden_size, dtype)

    def _table(self, device: torch.device, needed: int, asked: int) -> Tensor | None:
        """A table of at least `needed` rows on the device; None where it would be too large or hardly used."""
        for table in (self.table, self.longer):
            if table is not None and table.device == device and needed <= len(table):
                return table
        have = max(len(t) if t is not None and t.device == device else 0 for t in (self.table, self.longer))
        if needed > self.most or asked < needed - have:
            return None
        with torch.inference_mode(False):
            self.longer = self._first_rows(min(2 ** (needed - 1).bit_length(), self.most), device)
        return self.longer

    def _first_rows(self, count: int, device: torch.device | None = None) -> Tensor:
        return _computed(torch.arange(count, device=device), self.hidden_size, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> "SinusoidalPositions":
        before, self.longer = self.table, None
        super()._apply(fn, recurse)
        if self.table is not before and not self.table.is_meta:
            self.table = self._first_rows(len(self.table), self.table.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "longer": None}

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, length={self.length}"


class LearnedPositions(Positions):
    """A learned row for each of `length` positions. `extend_positions` makes the table longer."""

    def __init__(self, hidden_size: int, length: int) -> None:
        super().__init__()
        whole("hidden_size", hidden_size, 1)
        whole("length", length, 1)
        self.position_embeddings = nn.Embedding(length, hidden_size)

    def rows(self, position_ids: Tensor, highest: int | None, dtype: torch.dtype) -> Tensor:
        _check_end(highest, self.position_embeddings.num_embeddings)
        return self.position_embeddings(position_ids).to(dtype)


class LowRankPositions(Positions):
    """A table U V^T of rank `rank`: U [length rank] and V [hidden rank] are learned.

    error  None: both start at random, so that the product has the size of other embeddings. A number: they start as
           the best approximation of the sinusoidal table at this rank; `sinusoidal_rank` gives the rank at which the
           relative distance (Frobenius) is at most `error`. `distance` measures it for the factors as they are.
    (length + hidden) rank parameters instead of length hidden.
    """

    def __init__(self, hidden_size: int, length: int, rank: int, error: float | None = None) -> None:
        super().__init__()
        whole("hidden_size", hidden_size, 1)
        whole("length", length, 1)
        whole("rank", rank, 1)
        if rank > min(length, hidden_size):
            raise ValueError(
                f"a table of {length} positions and {hidden_size} channels has at most rank "
                f"{min(length, hidden_size)}, got {rank}; learned positions are its full-rank form"
            )
        if error is not None:
            _check_error(error)
        self.rank, self.error = rank, error
        self.unit = error is not None
        self.position_embeddings = nn.Embedding(length, rank)
        self.channels = nn.Linear(rank, hidden_size, bias=False)
        if not self.channels.weight.is_meta and self.channels.weight.numel():  # a partitioned one has none yet
            self.initialize(0.02)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        u, v = self.position_embeddings.weight, self.channels.weight
        if getattr(u, "_is_hf_initialized", False) and getattr(v, "_is_hf_initialized", False):
            return
        if self.error is None:
            each = math.sqrt(std / math.sqrt(self.rank))  # a sum of `rank` products of two has deviation std
            init.normal_(u, std=each)
            init.normal_(v, std=each)
            return
        length, width = len(u), len(v)
        basis = _spectrum(length, width)[1][:, : self.rank]
        init.copy_(u, torch.cat([rows @ basis for rows in _table_rows(length, width)]).to(u))
        init.copy_(v, basis.to(v))

    def rows(self, position_ids: Tensor, highest: int | None, dtype: torch.dtype) -> Tensor:
        _check_end(highest, self.position_embeddings.num_embeddings)
        return self.channels(self.position_embeddings(position_ids)).to(dtype)

    @torch.no_grad()
    def distance(self) -> float:
        """||U V^T - S|| / ||S|| from the sinusoidal table S, of the factors as they are now."""
        u, v = self.position_embeddings.weight.double().cpu(), self.channels.weight.double().cpu()
        off, total, start = 0.0, 0.0, 0
        for rows in _table_rows(len(u), len(v)):
            off += float((u[start : start + len(rows)] @ v.T - rows).square().sum())
            total, start = total + float(rows.square().sum()), start + len(rows)
        return math.sqrt(off / total)

    def extra_repr(self) -> str:
        return f"rank={self.rank}" + ("" if self.error is None else f", sinusoidal to {self.error:g}")


def sinusoidal_rank(length: int, hidden_size: int, error: float) -> int:
    """The least rank whose best approximation of the sinusoidal table [length hidden] is within `error` (Frobenius,
    relative). From an eigendecomposition of S^T S in float64: O(length hidden^2)."""
    _check_error(error)
    squares = _spectrum(length, hidden_size)[0]
    dropped = squares.flip(0).cumsum(0).flip(0)  # what is lost by keeping the n largest, for n = 0, 1, ...
    return int((dropped > error**2 * dropped[0]).sum().clamp(min=1, max=min(length, hidden_size)))


def make_positions(config: Any) -> Positions | None:
    """The module that a config's `position_encoding` names; None for "rotary" and "none".

    Reads hidden_size, max_position_embeddings (rows of the table), position_rank and position_error.
    """
    kind, hidden, length = config.position_encoding, config.hidden_size, config.max_position_embeddings
    if kind in ("rotary", "none"):
        return None
    if kind == "sinusoidal":
        return SinusoidalPositions(hidden, length)
    if kind == "learned":
        return LearnedPositions(hidden, length)
    if kind == "low_rank":
        rank, error = config.position_rank, getattr(config, "position_error", None)
        if rank is None:
            rank = min(RANK, length, hidden) if error is None else sinusoidal_rank(length, hidden, error)
        return LowRankPositions(hidden, length, rank, error)
    raise ValueError(
        f"unknown position_encoding {kind!r}; expected one of rotary, sinusoidal, learned, low_rank, none"
    )


def _computed(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`sinusoids` in `dtype`, a few rows at a time so that no float64 table is ever held."""
    device = positions.device
    flat = positions.flatten().to("cpu" if device.type == "mps" else device)  # Apple's GPUs have no float64
    parts = [sinusoids(part, width).to(dtype) for part in flat.split(max(_CHUNK // width, 1))]
    rows = torch.cat(parts) if parts else flat.new_zeros(0, width, dtype=dtype)
    return rows.to(device).view(*positions.shape, width)


def _table_rows(length: int, width: int) -> Iterator[Tensor]:
    """The sinusoidal table on the CPU in float64, a few rows at a time."""
    for positions in torch.arange(length, device="cpu").split(max(_CHUNK // width, 1)):
        yield sinusoids(positions, width)


def _spectrum(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Squared singular values [width] of the sinusoidal table, largest first, and its right singular vectors as
    columns [width width]."""
    gram = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    for rows in _table_rows(length, width):
        gram += rows.T @ rows
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(gram))
    return values.clamp(min=0).flip(0), vectors.flip(1)


def _check_end(highest: int | None, length: int) -> None:
    if highest is not None and highest >= length:
        raise ValueError(
            f"position {highest} was asked for, but the table has {length}, from 0 to {length - 1}: truncate the "
            f"input, call extend_positions(model, {highest + 1}), or train with max_position_embeddings="
            f"{highest + 1} or position_encoding='sinusoidal', which has no end"
        )


def _check_error(error: float) -> None:
    if not SMALLEST_ERROR <= error < 1.0:
        raise ValueError(f"the error of a low-rank table must lie in [{SMALLEST_ERROR:g}, 1), got {error}")
