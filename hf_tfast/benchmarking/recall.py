"""How much of dense attention's weight a pattern of pairs finds, and Hashed set to find as much as Reformer does.

Both are asked on the same queries and keys, those that Reformer makes of the activations: one projection, keys scaled
to unit length. A token's weight on itself is left out on both sides, as Reformer leaves it out of its softmax: shared
queries and keys give it most of the weight, and nobody has to look for it.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..attention import Mask, Mechanism, Score, attend
from ..attention.hashed import MOST_BITS, Hashed
from .peer_modules import CHUNK, Built, reformer_module
from .workload import Case, Inputs, join, make_inputs, split

QUERIES = 128  # evenly spaced queries whose whole rows are looked at
ROUNDS, MOST = 8, 1024  # of every number of rounds up to ROUNDS the least cap up to MOST that suffices is taken
FEWER, MORE = 3, 4  # bits: from so many fewer to so many more than make buckets of 128 keys
ROUND = 256  # what a round costs beside its pairs, in pairs of a query: hashing, sorting, gathers
TRIED = 6  # settings that should cost least are timed


def evenly(length: int, count: int) -> Tensor:
    """[n] int64: positions from the first to the last."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def pairs(mechanism: Mechanism, q: Tensor, k: Tensor, mask: Mask, few: Tensor, choice: Any) -> tuple[Tensor, Tensor]:
    """For the queries `few`: the pairs [b h n j] that the mechanism reads, and those [n j] of dense attention."""
    (b, h, _, _), j, device = q.shape, k.shape[2], q.device
    at = torch.arange(j, device=device)
    before = at <= few[:, None] if mask.causal else torch.ones(len(few), j, dtype=torch.bool, device=device)
    rows = torch.arange(b, device=device).view(-1, 1, 1, 1)
    heads = torch.arange(h, device=device).view(-1, 1, 1)
    seen = mechanism.allowed(choice, rows, heads, few[:, None], at, causal=mask.causal) & before
    return seen.expand(b, h, -1, -1), before


@torch.no_grad()
def density(case: Case, mechanism: Mechanism) -> float | None:
    """Share of the allowed pairs that the mechanism reads of the case's own queries and keys, in its first head;
    None where it is no pattern of pairs."""
    x, w_q, w_k, *_ = make_inputs(case).tensors
    q, k = (split(linear(x.float(), w[: case.width].float()), case.width) for w in (w_q, w_k))
    mask, few = Mask(causal=case.causal), evenly(case.length, 2 * QUERIES)
    try:
        seen, before = pairs(mechanism, q, k, mask, few, mechanism.choose(q, k, mask))
    except NotImplementedError:
        return None
    return (seen.sum() / before.expand_as(seen).sum()).item()


def shared(x: Tensor, w_qk: Tensor, w_v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as Reformer makes them; scores are their plain products."""
    q = split(linear(x, w_qk), width)
    k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) / width**0.5
    return q, k, split(linear(x, w_v), width)


def shared_module(case: Case, inputs: Inputs, *, mechanism: Mechanism) -> Built:
    """A mechanism in the place of Reformer's attention: three projections, shared queries and keys."""
    x, w_qk, _, w_v, w_o = inputs.tensors
    mask, score = Mask(causal=case.causal), Score(scale=1.0)
    return lambda: join(attend(*shared(x, w_qk, w_v, case.width), mechanism, mask, score), w_o), (x, w_qk, w_v, w_o)


def off_diagonal(q: Tensor, k: Tensor, few: Tensor) -> Tensor:
    """[b h n j]: dense weights of the queries `few` on all other tokens."""
    s = q[:, :, few] @ k.mT
    return s.masked_fill(torch.arange(k.shape[2]) == few[:, None], float("-inf")).softmax(-1)


def reformer_pairs(buckets: Tensor, length: int, few: Tensor) -> Tensor:
    """[b h n j]: what the queries `few` read, of the buckets [b h r l] of an LSHSelfAttention.

    Tokens of all rounds are sorted into one order, which is cut into chunks; a chunk reads itself and the one before,
    the first one the last.
    """
    b, h, rounds, _ = buckets.shape
    chunk = torch.empty(b, h, rounds * length, dtype=torch.int64)
    order = (buckets.reshape(b, h, -1) * length + torch.arange(length).repeat(rounds)).argsort(-1)
    chunk.scatter_(-1, order, (torch.arange(rounds * length) // CHUNK).expand(b, h, -1))
    chunk = chunk.view(b, h, rounds, length)
    total, seen = rounds * length // CHUNK, torch.zeros(b, h, len(few), length, dtype=torch.bool)
    for own in chunk[..., few].unbind(2):
        for other in chunk.unbind(2):
            seen |= (other[:, :, None] == own[..., None]) | (other[:, :, None] == (own[..., None] - 1) % total)
    return seen


@torch.no_grad()
def match(case: Case, hashes: int) -> dict[str, Any]:
    """The cheapest `Hashed` that finds at least what Reformer finds with `hashes`; both figures.

    Of every number of bits and rounds, the least cap that suffices is taken; of these, the ones that should cost least
    are timed, forward and backward, and the fastest wins. "mechanism" is None where none suffices.
    """
    inputs = make_inputs(case)
    x, w_qk, _, w_v, _ = inputs.tensors
    q, k, _ = shared(x, w_qk, w_v, case.width)
    few = evenly(case.length, QUERIES)
    weights, itself = off_diagonal(q, k, few), torch.arange(case.length) == few[:, None]
    theirs = reformer_pairs(reformer_module(case, inputs, hashes)(x).buckets, case.length, few) & ~itself
    wanted = (weights * theirs).sum(-1).mean().item()
    usual = case.length.bit_length() - 8
    found = [entry for bits in range(max(1, usual - FEWER), min(MOST_BITS, usual + MORE) + 1)
             for entry in _sufficient(bits, q, k, weights, few, wanted)]  # fmt: skip
    found.sort(key=lambda entry: entry[0])
    timed = [(_time(case, mechanism), mechanism) for _, mechanism in found[:TRIED]]
    best = min(timed, key=lambda entry: entry[0])[1] if timed else None
    recall = share = None
    if best is not None:
        seen = pairs(best, q, k, Mask(), few, best.choose(q, k, Mask()))[0] & ~itself
        recall, share = (weights * seen).sum(-1).mean().item(), seen.float().mean().item()
    return {
        "kind": "match", "series": f"Reformer {hashes}", "length": case.length, "hashes": hashes,
        "peer_recall": wanted, "peer_density": theirs.float().mean().item(),
        "recall": recall, "density": share, "mechanism": None if best is None else best.to_dict(),
        "reached_by": len(found), "content": case.content,
    }  # fmt: skip


def _sufficient(
    bits: int, q: Tensor, k: Tensor, weights: Tensor, few: Tensor, wanted: float
) -> list[tuple[float, Hashed]]:
    """With every number of rounds, the least cap at which the recall is `wanted`: what it should cost, itself."""
    mechanism = Hashed(bits=bits, rounds=ROUNDS, cap=2 * k.shape[2], window=0)
    runs, found = mechanism.choose(q, k, Mask()).runs, []
    itself = torch.arange(k.shape[2]) == few[:, None]
    least = torch.full(weights.shape, MOST + 1, dtype=torch.int32)  # cap from which on a pair is read
    for r in range(ROUNDS):
        rank = runs.rank[r][:, :, None]
        low, own, high = (x[r][:, :, few, None] for x in (runs.low, runs.own, runs.high))
        cap = torch.where(rank < own, 2 * (own - rank) - 1, 2 * (rank - own) + 2)
        least = torch.minimum(least, cap.masked_fill_((rank < low) | (rank >= high) | itself, MOST + 1))
        of = least.flatten()
        mass = torch.bincount(of, weights.flatten().double(), MOST + 2).cumsum(0) / weights[..., 0].numel()
        seen = torch.bincount(of, minlength=MOST + 2).cumsum(0) / weights[..., 0].numel()
        enough = (mass[: MOST + 1] >= wanted + 1e-6).nonzero()  # beside rounding
        if len(enough):
            suffices = int(enough[0])
            cost = seen[suffices].item() + ROUND * (r + 1)
            found.append((cost, Hashed(bits=bits, rounds=r + 1, cap=suffices, window=0)))
    return found


def _time(case: Case, mechanism: Mechanism) -> float:
    """Seconds of the faster of two calls, forward and backward."""
    from dataclasses import replace

    from .workload import Competitor, workload

    both = replace(case, passes="both")
    who = Competitor("", build=lambda case, inputs: shared_module(case, inputs, mechanism=mechanism))
    with torch.enable_grad():
        call, took = workload(both, who, make_inputs(both)), []
        for _ in range(2):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
    return min(took)
