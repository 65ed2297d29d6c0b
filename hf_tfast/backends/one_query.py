"""One query per row over some keys of a cache: a step of decoding.

In C (one_query.c) for fp32 and bf16 on a CPU whose compiler makes it on first use, see native.py; else in torch, which
is what `HF_TFAST_NATIVE=0` asks for. The two give the same numbers up to rounding, and neither touches a key that is
not read.

Axes   b batch, h query heads, g key/value heads, n slots of the cache, d key width, e value width, r hash rounds.
"""

import logging
import os
from ctypes import c_char_p, c_int
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .fused import DTYPES, SWITCH
from .growing import Lengths, longest
from .key_blocks import best, tied
from .rows import group
from .score import Score

__all__ = [
    "Reads", "attend_one", "best_blocks", "box_scores", "bucket_keys", "few_buckets", "near_scores", "where_true",
]  # fmt: skip

logger = logging.getLogger(__name__)


class Reads(NamedTuple):
    """What the queries of one step read.

    low, high   the slots low <= n < high: numbers, or [b] int64 where rows differ.
    first       and the slots n < first; first <= low.
    starts      and, of each head, runs of `span` slots from these on: None, or [b h m] int64, below 0 for none. They
                begin at multiples of `span`, as does the end of the room, and have no slot in common with the others.
    """

    low: Lengths
    high: Lengths
    first: int = 0
    starts: Tensor | None = None
    span: int = 1


_ATTEND, _BLOCKS, _BUCKET, _CORNERS = map(Struct, ("@33q2d", "@18qd", "@16q", "@15q"))  # as in the C


@cache
def _library() -> tuple[Any, ...] | None:
    """attend, blocks, bucket and corners; None where there is no C, said once."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        if not capability.startswith(("AVX", "AMX")):
            raise native.CannotCompile(f"this CPU has no wide vectors ({capability})")
        library = native.load("one_query")
    except native.CannotCompile as error:
        logger.warning("steps of decoding run on torch's own operations, which is slower: %s", error)
        return None
    names = ("one_query", "best_blocks", "bucket_keys", "corners")
    functions = tuple(getattr(library, f"tfast_{name}") for name in names)
    for function in functions:
        function.argtypes, function.restype = [c_char_p], c_int
    return functions


def _in_c(*tensors: Tensor) -> tuple[Any, ...] | None:
    """The C, if there is one and it serves these tensors of keys, values and queries."""
    dtype, graph = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in DTYPES or torch.compiler.is_compiling() or os.environ.get(SWITCH) == "0":
        return None
    for x in tensors:
        plain = type(x) is Tensor and x.is_cpu and x.dtype is dtype and x.stride(-1) == 1 and x.numel()
        if not plain or (graph and x.requires_grad):
            return None
    return _library()


def _rows(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(function: Any, packed: bytes) -> None:
    if function(packed):
        raise MemoryError("no memory for the scores of a step")


def attend_one(q: Tensor, k: Tensor, v: Tensor, reads: Reads, score: Score, beside: Tensor | None = None) -> Tensor:
    """Attention of q [b h 1 d] over what it reads of k [b g n d] and v [b g n e] -> [b h 1 e] in the dtype of v,
    computed in at least fp32. Zeros where a row reads nothing. No dropout.

    beside  None, or [b h]: logits that take part in the softmax without a value, as score.sinks do.
    """
    functions = _in_c(q, k, v)
    if functions is None:
        return _in_torch(q, k, v, reads, score, beside)
    (b, h, _, d), g, e = q.shape, k.shape[1], v.shape[-1]
    o = v.new_empty(b, h, 1, e)
    low, high, starts, many = reads.low, reads.high, reads.starts, 0
    lows = highs = None
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        lows, highs = (torch.as_tensor(x).expand(b).contiguous() for x in (low, high))
        low = high = 0
    if starts is not None:
        starts, many = starts.contiguous(), starts.shape[-1]
    sinks, beside = (None if x is None else x.detach().float().contiguous() for x in (score.sinks, beside))
    packed = _ATTEND.pack(
        *_rows(q), *_rows(k), *_rows(v), *_rows(o), _at(sinks), _at(beside), _at(starts), _at(lows), _at(highs),
        b, h, g, d, e, reads.first, low, high, many, reads.span, q.dtype is torch.bfloat16, torch.get_num_threads(),
        score.factor(d), score.softcap or 0.0,
    )  # fmt: skip
    _run(functions[0], packed)
    return o


def _in_torch(q: Tensor, k: Tensor, v: Tensor, reads: Reads, score: Score, beside: Tensor | None) -> Tensor:
    """`attend_one`, differentiable in q, k, v and score.sinks."""
    (b, h, _, d), g, scale = q.shape, k.shape[1], score.factor(q.shape[-1])
    rows = _wide(q, g)
    scores, values, sure = [], [], isinstance(reads.low, int) and isinstance(reads.high, int)
    for keys, some, hidden in _near(k, v, reads):
        s = score.cap(torch.bmm(rows, keys.to(rows.dtype).mT).view(b, h, -1) * scale)
        scores.append(s if hidden is None else s.masked_fill(hidden, float("-inf")))
        values.append(some.to(rows.dtype))
    near, sure = len(scores), sure and bool(scores)
    if reads.starts is not None and reads.starts.shape[-1]:
        keys, some = (_gathered(x, reads.starts, reads.span).to(rows.dtype) for x in (k, v))
        s = score.cap(torch.bmm(keys, rows.reshape(b * h, d, 1)).view(b, h, -1) * scale)
        gone = reads.starts.repeat_interleave(reads.span, -1) < 0
        scores.append(s.masked_fill(gone, float("-inf")))
        values.append(some.masked_fill(gone.view(b * h, -1, 1), 0.0))
    if not scores:
        return v.new_zeros(b, h, 1, v.shape[-1])
    sizes = [s.shape[-1] for s in scores]
    logits = [None if score.sinks is None else score.sinks.expand(b, h), beside]
    scores += [x.to(rows.dtype)[..., None] for x in logits if x is not None]
    whole = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    weights = whole.softmax(-1)
    if not sure:
        weights = weights.masked_fill(whole.amax(-1, keepdim=True) == float("-inf"), 0.0)
    parts = weights[..., : sum(sizes)].split(sizes, -1)
    o = rows.new_zeros(b * h, 1, v.shape[-1])
    for n, (part, some) in enumerate(zip(parts, values, strict=True)):
        shape = (b * g, h // g, -1) if n < near else (b * h, 1, -1)
        o = o + torch.bmm(part.reshape(shape), some).view(o.shape)
    return o.view(b, h, 1, -1).to(v.dtype)


def _wide(q: Tensor, g: int) -> Tensor:
    """[b h 1 d] -> [b*g h/g d] in at least fp32: the heads that share keys are the rows of one matmul."""
    return group(q.to(torch.promote_types(q.dtype, torch.float32)), g).flatten(0, 1)


def _near(k: Tensor, v: Tensor, reads: Reads) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Keys and values [b*g m .] of the slots that all heads read, and which of them a row has not, [b 1 m] bool."""
    if isinstance(reads.low, int) and isinstance(reads.high, int):
        runs = [slice(reads.low, reads.high), slice(0, reads.first)]
        return [(k[:, :, at].flatten(0, 1), v[:, :, at].flatten(0, 1), None) for at in runs if at.stop > at.start]
    low, high = (torch.as_tensor(x, device=k.device).expand(len(k))[:, None] for x in (reads.low, reads.high))
    slots = low + torch.arange(max(int((high - low).max()), 0), device=k.device)
    hidden, rows = (slots >= high)[:, None], torch.arange(len(k), device=k.device)[:, None]
    if not slots.shape[1]:
        return []
    slots = slots.clamp(max=k.shape[2] - 1)
    keys, values = (x[rows, :, slots].transpose(1, 2) for x in (k, v))
    values = values.masked_fill(hidden[..., None], 0.0)  # whatever lies there
    return [(keys.flatten(0, 1), values.flatten(0, 1), hidden)]


def _gathered(x: Tensor, starts: Tensor, span: int) -> Tensor:
    """[b*h m*span w]: the runs that start at `starts` [b h m] of x [b g n w]; no others are read."""
    (b, g, n, w), (h, m) = x.shape, starts.shape[1:]
    unit = torch.arange(0, b * g * n, n, device=x.device).repeat_interleave(h // g).view(b, h, 1)
    runs = (starts.clamp(min=0) + unit) // span
    return x.reshape(-1, span * w).index_select(0, runs.flatten()).view(b * h, m * span, w)


def near_scores(q: Tensor, k: Tensor, reads: Reads, score: Score) -> Tensor:
    """[b h m]: the scores of q [b h 1 d] with the slots of k [b g n d] that all heads read, and the sink logit."""
    (b, h, _, d), rows, scores = q.shape, _wide(q, k.shape[1]), []
    for keys, _, hidden in _near(k, k, reads):
        s = score.cap(torch.bmm(rows, keys.to(rows.dtype).mT).view(b, h, -1) * score.factor(d))
        scores.append(s if hidden is None else s.masked_fill(hidden, float("-inf")))
    if score.sinks is not None:
        scores.append(score.sinks.to(rows.dtype).expand(b, h)[..., None])
    return torch.cat(scores, -1)


def best_blocks(q: Tensor, boxes: Tensor, counts: Lengths, most: int, sign: float = 1.0) -> Tensor:
    """[b h min(most, counts)] int64: among the first `counts` blocks, a number or [b], those whose boxes [b g n 2d]
    allow the largest sign q . k, for q [b h 1 d]; `tied` ones by the earlier; -1 for none.

    boxes   the middle and half the width of the box that holds a block's keys, in at least fp32.
    """
    (b, h, _, d), g, count = q.shape, boxes.shape[1], longest(counts)
    most = min(most, count)
    functions = _in_c(q)
    if functions is None or boxes.dtype is not torch.float32 or not boxes.is_cpu or not most:
        scores = box_scores(_wide(q, g).unflatten(0, (b, g)) * sign, boxes[:, :, :count]).flatten(1, 2)
        if isinstance(counts, Tensor):
            there = torch.arange(count, device=q.device) < counts[:, None]
            scores = scores.masked_fill(~there[:, None], float("-inf"))
        return _largest(scores, most)
    rows = counts.contiguous() if isinstance(counts, Tensor) else None
    found = torch.empty(b, h, most, dtype=torch.int64)
    packed = _BLOCKS.pack(
        *_rows(q), *_rows(boxes), _at(rows), _at(found), b, h, g, d, count, most, q.dtype is torch.bfloat16,
        torch.get_num_threads(), sign,
    )  # fmt: skip
    _run(functions[1], packed)
    return found


def box_scores(q: Tensor, boxes: Tensor) -> Tensor:
    """[b g m n]: no key in box n of boxes [b g n 2d] has a larger q . k, for q [b g m d]."""
    return torch.bmm(torch.cat([q, q.abs()], -1).flatten(0, 1), boxes.flatten(0, 1).mT).unflatten(0, q.shape[:2])


def _largest(scores: Tensor, most: int) -> Tensor:
    """`best_blocks` of scores [b h n], -inf for none."""
    n = scores.shape[-1]
    if most < n:
        values, blocks = scores.topk(most + 1, dim=-1)
        if not bool(tied(values[..., 0], values[..., -2], values[..., -1]).any()):  # nor rows with fewer blocks
            return blocks[..., :most]
    return where_true(best(scores, most))


def where_true(read: Tensor) -> Tensor:
    """[b h m] int64: the places where `read` [b h n] is true, -1 after the last of them."""
    most = int(read.sum(-1).max()) if read.numel() else 0
    places = (~read).to(torch.int8).sort(dim=-1, stable=True).indices[..., :most]
    return places.masked_fill(~read.gather(-1, places), -1)


def bucket_keys(numbers: Tensor, asked: Tensor, low: Lengths, high: Lengths, most: int) -> Tensor:
    """[b h m] int64: the slots below `high` that have the query's number in some round and are among the last `most`
    with that number, each once; without those from `low` on, which are read as neighbours. -1 for none.

    numbers     [b g*r n] uint8 or int16: the bucket of every key, in every round.
    asked       [r b h] int32: the bucket of the query; numbers hold its lowest bits.
    low, high   numbers, or [b] int64.
    """
    (r, b, h), n = asked.shape, longest(high)
    most = min(most, n)
    plain = numbers.is_cpu and asked.is_cpu and type(numbers) is Tensor and numbers.stride(-1) == 1
    functions = _library() if plain and os.environ.get(SWITCH) != "0" and most else None
    if functions is None or torch.compiler.is_compiling():
        return _bucket_keys(numbers, asked, low, high, most)
    lows = highs = None
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        lows, highs = (torch.as_tensor(x).expand(b).contiguous() for x in (low, high))
        low = 0
    asked, found = asked.contiguous(), torch.empty(b, h, r * most, dtype=torch.int64)
    packed = _BUCKET.pack(
        numbers.data_ptr(), *numbers.stride()[:2], _at(asked), _at(lows), _at(highs), _at(found),
        b, h, numbers.shape[1] // r, r, most, low, n, numbers.element_size(), torch.get_num_threads(),
    )  # fmt: skip
    _run(functions[2], packed)
    return found


def _bucket_keys(numbers: Tensor, asked: Tensor, low: Lengths, high: Lengths, most: int) -> Tensor:
    (r, b, h), g, n = asked.shape, numbers.shape[1] // len(asked), longest(high)
    wanted = asked.to(numbers.dtype).permute(1, 2, 0).reshape(b, g, h // g, r, 1)
    same = numbers[:, :, :n].unflatten(1, (g, r))[:, :, None] == wanted  # [b g h/g r n]
    if isinstance(high, Tensor):
        same &= torch.arange(n, device=same.device) < high.view(-1, 1, 1, 1, 1)
    rows = torch.arange(b * h * r + 1, device=same.device) * n
    at = same.flatten().nonzero()[:, 0]
    ends = torch.searchsorted(at, rows)
    begins, ends = ends[:-1], ends[1:]
    most = min(most, int((ends - begins).max()))
    places = ends[:, None] - 1 - torch.arange(most, device=same.device)
    slots = (at[places.clamp(min=0)] - rows[:-1, None]).view(b, h, r * most)
    before = low.view(-1, 1, 1) if isinstance(low, Tensor) else low
    slots = slots.where((places >= begins[:, None]).view(slots.shape) & (slots < before), -1).sort(-1).values
    again = torch.zeros_like(slots, dtype=torch.bool)
    again[..., 1:] = slots[..., 1:] == slots[..., :-1]
    return slots.masked_fill(again, -1)


def few_buckets(x: Tensor, turns: Tensor, bits: int, rounds: int) -> Tensor | None:
    """`buckets` of a few vectors, in C; None where that does not serve."""
    functions = _in_c(x)
    if functions is None or turns.dtype is not torch.float32 or not turns.is_cpu or not turns.is_contiguous():
        return None
    b, g, n, d = x.shape
    found = torch.empty(rounds, b, g, n, dtype=torch.int32)
    packed = _CORNERS.pack(
        *_rows(x), turns.data_ptr(), found.data_ptr(), b, g, n, d, bits, rounds, turns.shape[-1] // rounds,
        x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    _run(functions[3], packed)
    return found
