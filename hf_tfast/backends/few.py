"""Softmax attention between many positions and few: many queries over few keys, and few queries over many keys.

The scores of a chunk of the many with all of the few are one batched matmul; forward keeps one number per query, and
backward recomputes the chunk (Dao et al., "FlashAttention", section 3.1), so memory is linear in the many. Everything
is computed in at least fp32, chunk by chunk: bf16 inputs are never widened whole.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from . import few_native, traced
from .native import as_rows

__all__ = ["few_keys", "few_queries", "few_queries_part", "segment_means", "with_means"]

ELEMENTS = 2**19  # scores computed at a time on a CPU: they stay in the cache between two passes
MORE = 2**25  # on other devices, which want few, large operations


def segment_means(x: Tensor, segments: int) -> Tensor:
    """[b h n d] -> [b h segments d] in at least fp32: means of n // segments tokens, of one more in the first ones.
    ValueError for fewer than one segment, or more than tokens."""
    _check_segments(x, segments)
    if few_native.serves((x,), (), None):
        return with_means(x, segments)[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    size, longer = divmod(x.shape[2], segments)
    border = longer * (size + 1)
    last = x[:, :, border:].unflatten(2, (segments - longer, size)).mean(3, dtype=wide)
    if not longer:
        return last
    return torch.cat([x[:, :, :border].unflatten(2, (longer, size + 1)).mean(3, dtype=wide), last], 2)


def with_means(x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """x as it is, for `few_keys` or `few_queries` and nobody else, and its `segment_means`: the gradient of x, which
    those two make anew, is added to in place."""
    _check_segments(x, segments)
    if few_native.serves((x,), (), None):
        return _Means.apply(x, segments)
    return x, segment_means(x, segments)


def few_keys(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Many queries q [b h i d] over few keys k [b g j d], v [b g j e] or [b h j e] -> [b h i e] in the dtype of q.

    `bias` [h j] is added to the scores, after the softcap. k, v and bias are read and differentiated in at least fp32.
    Differentiable once, in q, k, v and bias.
    """
    with torch.autocast(q.device.type, enabled=False):
        h, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
        k, v = (_heads(x.to(wide), h) for x in (k, v))
        bias = None if bias is None else bias.to(wide).repeat(q.shape[0], 1)[:, None]
        if traced.tracing():
            return traced.few_keys(q, k * scale, v, softcap, bias).to(q.dtype)
        return _FewKeys.apply(q, k * scale, v, bias, softcap)


def few_queries(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Few queries q [b h i d] over many keys k [b g j d], v [b g j e] -> [b h i e] in at least fp32.

    The queries that share a key head are rows of one matmul. `sinks` [h] are logits that carry no value.
    Differentiable once, in q, k, v and sinks.
    """
    o, lse = few_queries_part(q, k, v, scale, softcap=softcap)
    return o if sinks is None else o * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]


def few_queries_part(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`few_queries` of a part of the keys, and the logarithm [b h i] of its sum of weights, by which parts merge."""
    with torch.autocast(q.device.type, enabled=False):
        b, g = k.shape[:2]
        rows = (q.to(torch.promote_types(q.dtype, torch.float32)) * scale).reshape(b * g, -1, q.shape[-1])
        run = traced.few_queries if traced.tracing() else _FewQueries.apply
        o, lse = run(rows, k, v, softcap)
        return o.view(*q.shape[:3], -1), lse.view(q.shape[:3])


def _check_segments(x: Tensor, segments: int) -> None:
    if not traced.tracing() and not 1 <= segments <= x.shape[2]:  # sizes of a program may be open
        raise ValueError(f"expected 1 to {x.shape[2]} segments of {x.shape[2]} tokens, got {segments}")


def _heads(x: Tensor, h: int) -> Tensor:
    """[b g j d] -> [b h j d] as [n j d]: for the few only."""
    return x.repeat_interleave(h // x.shape[1], 1).flatten(0, 1)


def _chunks(length: int, others: int, device: torch.device) -> list[slice]:
    """Chunks of `length` positions, each of which meets `others` in all."""
    size = max(64, (ELEMENTS if device.type == "cpu" else MORE) // max(others, 1))
    return [slice(at, min(at + size, length)) for at in range(0, length, size)]


def _part(x: Tensor, at: slice, dtype: torch.dtype) -> Tensor:
    """[b h n d] -> [b*h c d]: a chunk, a view of heads side by side where there is one row."""
    return x[:, :, at].flatten(0, 1).to(dtype)


def _scores(q: Tensor, k: Tensor, softcap: float | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scores [n i j], and the slope of the softcap where there is one."""
    scores, slope = torch.bmm(q, k.mT), None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(softcap)
    return scores if bias is None else scores.add_(bias), slope


class _Means(torch.autograd.Function):
    """x [b h n d] -> x, means. The gradient of x comes from a function that made it for this one alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, segments: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), few_native.means(x, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dx: Tensor, grad: Tensor) -> tuple[Tensor, None]:
        (dx,) = as_rows(dx.contiguous() if 0 in dx.stride() else dx)  # an expanded one has no room of its own
        few_native.means_backward(dx, grad)
        return dx, None


class _FewKeys(torch.autograd.Function):
    """Queries [b h i d] in any dtype, chunked; keys (scaled), values and bias [n 1 j] in at least fp32."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)  # type: ignore[arg-type]
        ctx.softcap = softcap  # type: ignore[attr-defined]
        fixed = not ctx.needs_input_grad[3]  # type: ignore[attr-defined]
        ctx.native = fixed and few_native.serves((q,), (k, v, bias), softcap)  # type: ignore[attr-defined]
        if ctx.native:  # type: ignore[attr-defined]
            return few_native.keys(q, k, v, bias)
        (b, h, i, _), e = q.shape, v.shape[-1]
        o = q.new_empty(b, i, h, e).transpose(1, 2)  # heads side by side: what an output projection reads
        for at in _chunks(i, k.shape[0] * k.shape[1], q.device):
            scores, _ = _scores(_part(q, at, k.dtype), k, softcap, bias)
            o[:, :, at] = torch.bmm(torch.softmax(scores, -1, out=scores), v).view(b, h, -1, e)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors  # type: ignore[attr-defined]
        if ctx.native:  # type: ignore[attr-defined]
            return *few_native.keys_backward(q, k, v, bias, grad), None, None
        dq, (b, h) = torch.empty_like(q), q.shape[:2]
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dbias = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(q.device.type, enabled=False):
            for at in _chunks(q.shape[2], k.shape[0] * k.shape[1], q.device):
                rows, up = _part(q, at, k.dtype), _part(grad, at, k.dtype)
                scores, slope = _scores(rows, k, ctx.softcap, bias)  # type: ignore[attr-defined]
                p = torch.softmax(scores, -1, out=scores)
                dv.baddbmm_(p.mT, up)
                ds = torch.ops.aten._softmax_backward_data(torch.bmm(up, v.mT), p, -1, p.dtype)
                if dbias is not None:
                    dbias += ds.sum(1, keepdim=True)
                ds = ds if slope is None else ds.mul_(slope)
                dq[:, :, at] = torch.bmm(ds, k).view(b, h, -1, k.shape[-1])
                dk.baddbmm_(ds.mT, rows)
        return dq, dk, dv, dbias, None


class _FewQueries(torch.autograd.Function):
    """Queries [b*g m d] (scaled) in at least fp32; keys and values [b g j .] in any dtype, chunked, merged by their
    sums of weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        ctx.softcap = softcap  # type: ignore[attr-defined]
        ctx.native = few_native.serves((k, v), (q,), softcap)  # type: ignore[attr-defined]
        if ctx.native:  # type: ignore[attr-defined]
            o, lse = few_native.queries(q, k, v)
            ctx.save_for_backward(q, k, v, o, lse)
            return o, lse
        parts, sums = [], []
        for at in _chunks(k.shape[2], q.shape[0] * q.shape[1], q.device):
            scores, _ = _scores(q, _part(k, at, q.dtype), softcap)
            top = scores.amax(-1, keepdim=True)
            p = torch.softmax(scores, -1, out=scores)  # faster than exp; its largest weight tells its sum
            sums.append(top - p.amax(-1, keepdim=True).log())
            parts.append(torch.bmm(p, _part(v, at, q.dtype)))
        lse = torch.stack(sums).logsumexp(0)
        o = torch.zeros_like(parts[0])
        for part, total in zip(parts, sums, strict=True):
            o.addcmul_(part, (total - lse).exp())
        lse = lse[..., 0]
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        rest = dlse - (grad * o).sum(-1)
        if ctx.native:  # type: ignore[attr-defined]
            return *few_native.queries_backward(q, k, v, lse, rest, grad), None
        lse, rest = lse[..., None], rest[..., None]
        dq, (b, g) = torch.zeros_like(q), k.shape[:2]
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        with torch.autocast(q.device.type, enabled=False):
            for at in _chunks(k.shape[2], q.shape[0] * q.shape[1], q.device):
                keys = _part(k, at, q.dtype)
                scores, slope = _scores(q, keys, ctx.softcap)  # type: ignore[attr-defined]
                p = scores.sub_(lse).exp_()
                dv[:, :, at] = torch.bmm(p.mT, grad).view(b, g, -1, v.shape[-1])
                ds = torch.bmm(grad, _part(v, at, q.dtype).mT).add_(rest).mul_(p)
                ds = ds if slope is None else ds.mul_(slope)
                dq.baddbmm_(ds, keys)
                dk[:, :, at] = torch.bmm(ds.mT, q).view(b, g, -1, k.shape[-1])
        return dq, dk, dv, None
