"""Bands and listed blocks in C: scores, softmax and output of a few rows at a time while they lie in the cache.

See band_steps.c, which the machine's own compiler makes on first use (native.py). It serves bands without holes, first
keys and listed blocks of keys on a CPU with AVX2 or more, forward and backward, in fp32 and bf16 (fp16 comes as fp32),
with sink logits; tiles.py serves all else, and everything where there is no compiler, which is said once in the log,
or where HF_TFAST_NATIVE=0 asks for it.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import SWITCH, Rows, as_rows
from .score import Score
from .tiles import Call, Layout

__all__ = ["SWITCH", "add_backward", "as_rows", "forward", "serves"]

WIDEST = 4096  # keys of a band, at most: a few rows of scores should fit the second-level cache
ROWS = 24  # of a block
CHUNK = (192, 768)  # queries that share packed keys: a quarter of all, between these
LISTED = (512, 16384)  # blocks in a list, and keys in them, at most
PACKED = 8  # keys to a query, at most, where each chunk packs every key
PIECES, LEAST = 16, 512  # then: chunks in all, and queries of one, so that packing stays a small part
FEWEST = 64  # queries of a chunk that reads every key
ROOM = 2**31  # bytes that the packed keys of all threads take together, where one thread does not take more
DTYPES = (torch.float32, torch.bfloat16)
TENSORS = ("q", "k", "v", "o", "grad", "dq", "dk", "dv")
SIZES = [
    "batch",
    "heads",
    "groups",
    "queries",
    "keys",
    "d",
    "e",
    "before",
    "after",
    "first",
    "offset",
    "chunk",
    "rows",
    "list",
    "most",
    "block",
]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ("sinks", "dsinks", "dfirst", "lists")),
        *((name, ctypes.c_long) for name in SIZES),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("banded", ctypes.c_int),
        ("causal", ctypes.c_int),
    ]


def serves(layout: Layout, score: Score, q: Tensor, k: Tensor, v: Tensor, start: int) -> bool:
    """Is this call one for the C, and is there one?"""
    if not native.wanted(q, k, v) or not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES or start:
        return False
    known = layout.causal or layout.open_sinks or not layout.sinks
    known = known and (layout.solid if layout.lists is None else _serves_lists(layout, q.shape[2], k.shape[2]))
    simple = score.softcap is None and not score.dropout
    sized = 0 < layout.before + layout.after + 1 <= WIDEST and min(*q.shape, *v.shape) > 0
    return known and simple and sized and _library() is not None


def _serves_lists(layout: Layout, i: int, j: int) -> bool:
    """Are the lists short, and the queries worth that every key is packed?"""
    lists = layout.lists
    if lists is None or not (layout.solid or layout.near is None):
        return False
    blocks, keys = LISTED
    most = lists.shape[-1]
    return most <= blocks and max(most, 1) * layout.block <= keys and j <= PACKED * i


@cache
def _library() -> list[Any] | None:
    """Forward and backward; None where there is no C, said once."""
    return native.on_vectors(
        "band_steps", ("tfast_band_forward", "tfast_band_backward"), _Call, "attention in a window"
    )


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor) -> None:
    """Write o [b h i e]."""
    for part in _parts(call, False):
        _run(part, call, {"q": q, "k": k, "v": v, "o": o}, sinks)


def add_backward(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Write dq; add to dk, dv and dsinks, all three fp32."""
    (q, k, v, sinks), (dq, dk, dv, dsinks) = inputs, grads
    (grad,) = as_rows(grad)
    tensors = {"q": q, "k": k, "v": v, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
    for part in _parts(call, True):
        first = 0 if part.lists is not None else part.first
        apart = dk.new_zeros(part.chunks, call.b, call.g, first, call.d + v.shape[-1]) if first else None
        logits = None if dsinks is None else dk.new_zeros(part.chunks, call.b, call.h)
        _run(part, call, tensors, sinks, logits, apart)
        if apart is not None:
            more = apart.sum(0)
            dk[:, :, :first] += more[..., : call.d]
            dv[:, :, :first] += more[..., call.d :]
        if dsinks is not None and logits is not None:
            dsinks += logits.sum((0, 1))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Queries [low, high) of a call, in chunks, and the keys that they read: see Layout."""

    backward: bool
    low: int
    high: int
    chunk: int
    before: int
    after: int = 0
    first: int = 0
    lists: Tensor | None = None
    banded: bool = True

    @property
    def chunks(self) -> int:
        return -(-(self.high - self.low) // self.chunk)


def _parts(call: Call, backward: bool) -> Iterator[_Part]:
    """The queries that read every key, for which the band is that wide; then the others."""
    lay, opened = call.layout, call.opened
    pieces = 1 if backward else max(PIECES // (call.b * call.g), 1)  # no two chunks add to the same gradients
    if opened:
        chunk = max(-(-opened // pieces), min(FEWEST, opened))
        yield _Part(
            backward=backward, low=0, high=opened, chunk=chunk, before=call.offset + opened - 1,
            after=0 if lay.causal else call.j - 1 - call.offset,
        )  # fmt: skip
    if (queries := call.i - opened) <= 0:
        return
    if lay.lists is not None:
        chunk = queries if backward else max(-(-call.i // pieces), LEAST)
    else:
        least, most = CHUNK
        chunk = min(max(call.i // 4 // ROWS * ROWS, least), most)
        chunk = max(chunk, lay.before + lay.after) if backward else chunk  # then every other one has its own keys
    yield _Part(
        backward=backward, low=opened, high=call.i, chunk=chunk, before=lay.before,
        after=0 if lay.causal else lay.after, first=min(lay.sinks, call.j), lists=lay.lists,
        banded=lay.near is not None,
    )  # fmt: skip


def _run(
    part: _Part,
    call: Call,
    tensors: dict[str, Tensor],
    sinks: Tensor | None,
    dsinks: Tensor | None = None,
    apart: Tensor | None = None,
) -> None:
    v = tensors["v"]
    logits = None if sinks is None else sinks.detach().float().contiguous()
    lists = None if part.lists is None else _lists(part.lists, call)
    table = (0, 0, 1)
    if lists is not None:
        table = (lists[0].numel() if len(lists) > 1 else 0, lists.shape[-1], call.layout.block)
    sizes = (
        call.b, call.h, call.g, part.high - part.low, call.j, call.d, v.shape[-1], part.before, part.after,
        part.first, call.offset + part.low, part.chunk, ROWS, *table,
    )  # fmt: skip
    given = _Call(
        scale=call.score.factor(call.d),
        bf16=tensors["q"].dtype == torch.bfloat16,
        threads=min(torch.get_num_threads(), call.b * call.g * part.chunks, max(1, ROOM // _packed(part, call, v))),
        banded=part.banded,
        causal=call.layout.causal,
        **dict(zip(SIZES, sizes, strict=True)),
    )
    for name, x in tensors.items():
        x = x[:, :, part.low :] if name in ("q", "o", "grad", "dq") else x
        setattr(given, name, Rows.of(x))
    for name, room in (("sinks", logits), ("dsinks", dsinks), ("dfirst", apart), ("lists", lists)):
        setattr(given, name, None if room is None else room.data_ptr())
    functions = _library()
    if functions is None:
        raise RuntimeError("a band was given to the C, but there is none: ask `serves` first")
    if functions[part.backward](ctypes.byref(given)):
        raise MemoryError("no memory for the packed keys of a chunk")


def _packed(part: _Part, call: Call, v: Tensor) -> int:
    """Bytes of the keys and values that a thread packs, and backward of their gradients."""
    keys = call.j if part.lists is not None else part.first + part.chunk + part.before + part.after
    return 4 * keys * (call.d + v.shape[-1]) * (3 if part.backward else 1)


def _lists(lists: Tensor, call: Call) -> Tensor:
    """As the C reads them: [h or 1, blocks of queries, at least 1] int64, side by side."""
    if (covered := lists.shape[1] * call.layout.block) < call.j:
        raise ValueError(f"the lists cover {covered} positions, but there are {call.j}")
    if len(lists) not in (1, call.h):
        raise ValueError(f"lists of blocks are for 1 or for all {call.h} heads, got lists of {len(lists)}")
    if not lists.shape[-1]:
        lists = lists.new_full((1, lists.shape[1], 1), -1)
    return lists.to(call.device, torch.int64).contiguous()
