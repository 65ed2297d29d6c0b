"""Losses of distillation as pure functions of the student's and the teacher's numbers.

One reduction for all: the sum over the tokens that are kept, divided by `count`.

    keep   [b n] bool: tokens that count; None: all. A token that does not count may hold anything, NaN too: it changes
           neither the loss nor a gradient.
    count  what the sum is divided by; None: the kept tokens of this call. A training that accumulates gradients, or
           runs in several processes, gives the number of kept tokens of the whole step (Trainer's
           num_items_in_batch), so that the step is the same however it is cut into batches.

Every loss is a scalar in at least fp32 and has gradients towards the student alone. ValueError where shapes do not
fit. Axes: b batch, n tokens, v vocabulary, d width, h heads, e width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

__all__ = [
    "DIVERGENCES",
    "IGNORED",
    "STATES",
    "TopLogits",
    "attention_output_loss",
    "cross_entropy",
    "embedding_cosine",
    "hidden_loss",
    "logits_divergence",
    "next_tokens",
    "relation_loss",
    "top_logits",
    "top_logits_divergence",
]

IGNORED = -100  # a label that no loss counts
DIVERGENCES = ("forward", "reverse", "jsd")
STATES = ("mse", "relative", "cosine")
Count = Tensor | float | int | None


def next_tokens(labels: Tensor) -> Tensor:
    """Labels [b n] as Transformers has them for causal models -> [b n] of what each position predicts: the next one.

    The last position predicts nothing, so logits need not be cut.
    """
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], dim=-1)


def cross_entropy(logits: Tensor, labels: Tensor, count: Count = None, *, smoothing: float = 0.0) -> Tensor:
    """-log p(label) of the student. logits [b n v]; labels [b n], aligned with them (`next_tokens`), IGNORED left out.

    smoothing  share of the target that is spread over the vocabulary. Source: Szegedy et al.,
               https://arxiv.org/abs/1512.00567, section 7.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must be {tuple(logits.shape[:-1])} for these logits, got {tuple(labels.shape)}")
    keep = labels != IGNORED
    nats = F.cross_entropy(_wide(logits[keep]), labels[keep], reduction="none", label_smoothing=smoothing)
    return _mean(nats, count)


def logits_divergence(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None = None,
    count: Count = None,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
    chunk: int | None = None,
) -> Tensor:
    """Divergence of the student's distribution q from the teacher's p, times temperature^2. Logits [b n v] both.

        forward   KL(p || q): q covers all that p does      reverse   KL(q || p): q keeps to what p is sure of
        jsd       beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

    chunk  tokens whose fp32 probabilities exist at a time; the backward computes them again. None: all at once.
    Source: Hinton et al., https://arxiv.org/abs/1503.02531, section 2 (temperature and its square); Agarwal et al.,
    https://arxiv.org/abs/2306.13649, section 2 (reverse, jsd).
    """
    _same(student, teacher, "logits")
    _check_divergence(temperature, kind, beta)

    def nats(z: Tensor, y: Tensor) -> Tensor:
        log_q, log_p = ((_wide(x) / temperature).log_softmax(-1) for x in (z, y))
        return _divergence(log_p, log_q, kind, beta)

    rows = _kept(keep, student), _kept(keep, teacher).detach()
    return _mean(_by_chunks(nats, chunk, *rows), count) * temperature**2


@dataclass(frozen=True)
class TopLogits:
    """The teacher's `k` most likely tokens of every position: what fits on a disk.

    indices      [.. k] int, the tokens
    logs         [.. k] their log-probabilities, at `temperature`
    rest         [..] log of the probability of all other tokens together; -inf where there are none
    """

    indices: Tensor
    logs: Tensor
    rest: Tensor
    temperature: float = 1.0


def top_logits(logits: Tensor, k: int, temperature: float = 1.0) -> TopLogits:
    """The top-k form of logits [.. v]; k beyond v keeps all."""
    if k < 1:
        raise ValueError(f"at least the most likely token has to be kept, got k={k}")
    _check_divergence(temperature, "forward", 0.5)
    logs = (_wide(logits.detach()) / temperature).log_softmax(-1)
    best = logs.topk(min(k, logs.shape[-1]), dim=-1)
    rest = logs.scatter(-1, best.indices, -math.inf).logsumexp(-1)
    return TopLogits(best.indices, best.values, rest, temperature)


def top_logits_divergence(
    student: Tensor,
    teacher: TopLogits,
    keep: Tensor | None = None,
    count: Count = None,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    chunk: int | None = None,
) -> Tensor:
    """`logits_divergence` over k + 1 outcomes: the teacher's k tokens, and any other. student [b n v].

    Merging outcomes never enlarges a divergence: this is at most the full one, and equal to it where k is v. What the
    student does among the tokens outside the k is free. The temperature is that of `teacher`.
    """
    t = teacher.temperature
    _check_divergence(t, kind, beta)
    if student.shape[:-1] != teacher.rest.shape:
        raise ValueError(f"student logits are {tuple(student.shape)}, the teacher's {tuple(teacher.rest.shape)} + [v]")
    if teacher.indices.numel() and int(teacher.indices.max()) >= student.shape[-1]:
        raise ValueError(
            f"the teacher's token {int(teacher.indices.max())} is beyond the student's {student.shape[-1]} logits"
        )

    def nats(z: Tensor, indices: Tensor, logs: Tensor, rest: Tensor) -> Tensor:
        every = (_wide(z) / t).log_softmax(-1)
        others = every.scatter(-1, indices, -math.inf)
        none = torch.isneginf(others).all(-1)  # k is v: there is no other token
        log_rest = others.masked_fill(none[:, None], 0.0).logsumexp(-1).masked_fill(none, -math.inf)
        log_q = torch.cat([every.gather(-1, indices), log_rest[:, None]], -1)
        return _divergence(torch.cat([logs, rest[:, None]], -1).to(log_q.dtype), log_q, kind, beta)

    given = [_kept(keep, x, student.ndim - 1).detach() for x in (teacher.indices.long(), teacher.logs, teacher.rest)]
    return _mean(_by_chunks(nats, chunk, _kept(keep, student), *given), count) * t**2


def hidden_loss(
    student: Tensor, teacher: Tensor, keep: Tensor | None = None, count: Count = None, *, kind: str = "mse"
) -> Tensor:
    """Distance of hidden states y of the student from those x of the teacher, [b n d] both, token by token.

        mse   |y - x|^2 / d        relative   |y - x|^2 / |x|^2, so that layers of any size weigh the same
        cosine   1 - cos(y, x)

    Other widths: put a projection (`layers.Projections`) on the student's first.
    Source: FitNets, https://arxiv.org/abs/1412.6550, section 2; cosine: DistilBERT, https://arxiv.org/abs/1910.01108.
    """
    _same(student, teacher, "hidden states")
    if kind not in STATES:
        raise ValueError(f"hidden states are compared by {', '.join(STATES)}, got {kind!r}")
    y, x = _wide(_kept(keep, student)), _wide(_kept(keep, teacher)).detach()
    if kind == "cosine":
        return _mean(1.0 - F.cosine_similarity(y, x, dim=-1), count)
    off = (y - x).square()
    if kind == "mse":
        return _mean(off.mean(-1), count)
    return _mean(off.sum(-1) / x.square().sum(-1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5), count)


def attention_output_loss(
    student: Tensor, teacher: Tensor, keep: Tensor | None = None, count: Count = None, *, kind: str = "mse"
) -> Tensor:
    """`hidden_loss` of what attention gives before its output projection: [b n h e], or [b n h*e] with heads merged.

    Needs no map of weights [n n], so it suits students that never form one. With a head axis the distance is taken
    head by head and averaged over heads. Source: LoLCATs, https://arxiv.org/abs/2410.10254, section 3.2.
    """
    _same(student, teacher, "attention outputs")
    if student.ndim == 3:
        return hidden_loss(student, teacher, keep, count, kind=kind)
    heads = student.shape[2]
    keep = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if keep is None else keep
    count = keep.sum() if count is None else count
    every = keep[..., None].expand(student.shape[:3])
    return hidden_loss(student, teacher, every, count, kind=kind) / heads


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor | None = None,
    count: Count = None,
    *,
    heads: int = 1,
    chunk: int | None = 512,
) -> Tensor:
    """KL of the relations softmax(x x^T / sqrt(d / heads)) between tokens; mean over relation heads.

    student [b n d], teacher [b n d']: queries, keys, values or states; widths may differ, and so may the models' own
    heads, for both are cut into `heads` pieces. Relations are among kept tokens only. Two-way: a relation sees tokens
    after its own. O(n^2) time; memory for `chunk` rows of a map at a time (None: a whole map).
    Source: MiniLMv2, https://arxiv.org/abs/2012.15828, section 3.1.
    """
    if student.shape[:-1] != teacher.shape[:-1] or student.ndim != 3:
        raise ValueError(f"expected [b n d] and [b n d'], got {tuple(student.shape)} and {tuple(teacher.shape)}")
    for whose, x in (("student", student), ("teacher", teacher)):
        if heads < 1 or x.shape[-1] % heads:
            raise ValueError(f"the {whose}'s width {x.shape[-1]} cannot be cut into {heads} relation heads")
    keep = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if keep is None else keep.bool()
    total = _wide(student.new_zeros(()))
    for y, x, kept in zip(student, teacher.detach(), keep, strict=True):
        y, x = (_wide(z[kept]).unflatten(-1, (heads, -1)).transpose(0, 1) for z in (y, x))  # [heads n d]
        total = total + _by_chunks(_relations(y, x), chunk, torch.arange(y.shape[1], device=y.device)).sum()
    return total / _count(int(keep.sum()) if count is None else count) / heads


def _relations(y: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows of tokens -> their KL [rows], summed over heads."""

    def nats(rows: Tensor) -> Tensor:
        log_q, log_p = ((z[:, rows] @ z.mT * z.shape[-1] ** -0.5).log_softmax(-1) for z in (y, x))
        return _divergence(log_p, log_q, "forward", 0.5).sum(0)

    return nats


def embedding_cosine(student: Tensor, teacher: Tensor, count: Count = None) -> Tensor:
    """1 - cos of embeddings [b d] of whole texts; `count` texts, None: b. Both as the models give them, of any length.

    Source: Reimers and Gurevych, https://arxiv.org/abs/2004.09813, which takes the squared distance.
    """
    return hidden_loss(student, teacher, None, count, kind="cosine")


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """[.. v] log-probabilities of teacher and student -> [..] nats. Outcomes of probability 0 add nothing."""
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q). Where p is 0 the term and its gradients are 0, whatever q is."""
    never = torch.isneginf(log_p)
    log_p, log_q = log_p.masked_fill(never, 0.0), log_q.masked_fill(never, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(never, 0.0).sum(-1)


def _by_chunks(nats: Callable[..., Tensor], chunk: int | None, *rows: Tensor) -> Tensor:
    """nats(*rows), computed for `chunk` rows at a time; the backward computes each chunk again."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk holds at least 1 token, got {chunk}")
    if chunk is None or len(rows[0]) <= chunk:
        return nats(*rows)
    parts = zip(*(x.split(chunk) for x in rows), strict=True)
    return torch.cat([checkpoint(nats, *part, use_reentrant=False) for part in parts])


def _kept(keep: Tensor | None, x: Tensor, leading: int | None = None) -> Tensor:
    """x [b n ..] -> [t ..], the kept tokens; `leading` axes are of tokens, None: all but the last."""
    leading = x.ndim - 1 if leading is None else leading
    if keep is None:
        return x.flatten(0, leading - 1) if leading > 1 else x
    if keep.shape != x.shape[:leading]:
        raise ValueError(f"keep must be {tuple(x.shape[:leading])}, got {tuple(keep.shape)}")
    return x[keep.bool()]


def _mean(nats: Tensor, count: Count) -> Tensor:
    return nats.sum() / _count(len(nats) if count is None else count)


def _count(count: Tensor | float | int) -> Tensor | float:
    """The divisor; a step without tokens has a loss of 0, not NaN."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _same(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _check_divergence(temperature: float, kind: str, beta: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    if kind not in DIVERGENCES:
        raise ValueError(f"a divergence is one of {', '.join(DIVERGENCES)}, got {kind!r}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}; the ends are kind='forward' and 'reverse'")
