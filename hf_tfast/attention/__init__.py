"""What is computed: one file per mechanism. `attend` is the functional door to all of them."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..backends.score import Score
from ._backends import BACKENDS, choose_backend
from ._base import Mask, Mechanism, mechanism_from_dict, mechanisms
from ._rows import over_full_rows

__all__ = [
    "BACKENDS", "Mask", "Mechanism", "Score", "attend", "choose_backend", "mechanism_from_dict", "mechanisms",
]  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mechanism: Mechanism,
    mask: Mask = Mask(),  # noqa: B008 frozen
    score: Score = Score(),  # noqa: B008 frozen
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention of the queries `q` over keys `k` and values `v` by `mechanism`.

    q [b h i d], k [b g j d], v [b g j e] of one floating dtype and device -> [b h i e]; h % g == 0, i <= j: the
    queries are the last i positions. Differentiable in q, k, v and score.sinks.

    backend  "auto" takes the fastest there is (see `choose_backend`); "reference" is the O(i j) definition; any other
             runs or raises.
    Raises   ValueError for shapes, dtypes or devices that do not fit, for causal use of a mechanism without a causal
             form, for a basis where none is due, and for dropout where a mechanism gives it no meaning.
    """
    _check(q, k, v, mechanism, mask, score)
    if score.dropout and score.seed is None:
        score = replace(score, seed=int(torch.randint(2**31 - 1, ())))
    chosen = choose_backend(mechanism, backend, q, k, v, mask, score)
    run = mechanism.reference if chosen == "reference" else partial(_fast, mechanism, chosen)
    with torch.autocast(q.device.type, enabled=False):  # its matmuls would go below the precision that q asks for
        return over_full_rows(run, q, k, v, mask, score)


def _fast(mechanism: Mechanism, backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score) -> Tensor:
    return mechanism.fast(q, k, v, mask, score, backend)


def _check(q: Tensor, k: Tensor, v: Tensor, mechanism: Mechanism, mask: Mask, score: Score) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"mechanism must be a Mechanism such as Window(window=512), got {mechanism!r}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"expected q [b h i d], k [b g j d], v [b g j e], got {shapes}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch, key heads, keys and key width must agree, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly: {shapes}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"the queries are the last positions of the keys, but there are more of them: {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    mechanism.check(q, k, mask, score)
    if score.dropout and not mechanism.dropout:
        raise ValueError(
            f"{mechanism.name} has no attention dropout; set the model's attention dropout "
            "(config.attention_dropout, attention_probs_dropout_prob or attn_pdrop) to 0.0"
        )
    _check_mask(mask, k.shape[0], k.shape[2])
    if score.sinks is not None and score.sinks.shape != (q.shape[1],):
        raise ValueError(f"score.sinks must be [h] = ({q.shape[1]},), got {tuple(score.sinks.shape)}")


def _check_mask(mask: Mask, b: int, j: int) -> None:
    for name, rows in (("valid", mask.valid), ("segments", mask.segments)):
        if rows is not None and rows.shape != (b, j):
            raise ValueError(f"mask.{name} must be [b j] = {(b, j)}, got {tuple(rows.shape)}")
    if mask.valid is not None and mask.valid.dtype != torch.bool:
        raise ValueError(f"mask.valid must be bool, True where a key exists, got {mask.valid.dtype}")
    if mask.segments is not None and (mask.segments.is_floating_point() or mask.segments.is_complex()):
        raise ValueError(f"mask.segments must be integers, 0 where there is padding, got {mask.segments.dtype}")
    for name, count in (("start", mask.start), ("kept", mask.kept)):
        if isinstance(count, Tensor):
            if count.numel() != 1 and count.shape != (b,):
                raise ValueError(f"mask.{name} must be one number or [b] = ({b},), got {tuple(count.shape)}")
        elif count < 0:
            raise ValueError(f"mask.{name} must be at least 0, got {count}")
