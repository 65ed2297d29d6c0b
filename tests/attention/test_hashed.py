"""Hashed beyond the contract: the choice itself, rotations, linear work in the worst case, what hashing finds."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.hashed import MOST_BITS, Hashed, rotations, tile_size
from hf_tfast.backends.buckets import buckets, directions, parts
from hf_tfast.backends.lists import Sizes
from hf_tfast.backends.runs import Runs, run_lists
from hf_tfast.testing import Shape, assert_near, generator, naive_attention, qkv
from tests.attention import contract
from tests.attention.test_topk import pairs_of

OTHERS = (
    Hashed(bits=0, rounds=1, cap=9, window=2),
    Hashed(bits=3, rounds=2, cap=1, window=1, seed=-7),
    Hashed(bits=10, rounds=4, cap=50, window=3),
    Hashed(bits=3, rounds=2, cap=3, window=0),
)


def buckets_of(mechanism, turn, x):
    """[n][r]: the corner of every factor that is nearest, by its definition."""
    found, at = [[[] for _ in range(mechanism.rounds)] for _ in x], 0
    for r in range(mechanism.rounds):
        for bits in parts(mechanism.bits):
            y = x @ turn[:, at : at + 2 ** (bits - 1)]
            for n, corner in enumerate(torch.cat([y, -y], -1).argmax(-1).tolist()):
                found[n][r].append(corner)
            at += 2 ** (bits - 1)
    assert at == turn.shape[1]
    return found


def expected_pairs(mechanism, q, k, causal, first_head=0):
    """The rule of the docstring, one query at a time."""
    (b, h, i, d), (g, j) = q.shape, k.shape[1:3]
    pairs = torch.zeros(b, h, i, j, dtype=torch.bool)
    for head in range(h):
        turn = rotations(mechanism.seed, (first_head + head) // (h // g), mechanism.rounds, d, mechanism.bits)
        for row in range(b):
            queries, keys = (buckets_of(mechanism, turn, x) for x in (q[row, head], k[row, head // (h // g)]))
            for t in range(i):
                p = t + j - i
                for r in range(mechanism.rounds):
                    same = [m for m in range(j) if keys[m][r] == queries[t][r]]
                    before, after = [m for m in same if m <= p], [m for m in same if m > p]
                    if causal:
                        pairs[row, head, t, before[-mechanism.cap :]] = True
                    else:
                        pairs[row, head, t, before[-((mechanism.cap + 1) // 2) :] + after[: mechanism.cap // 2]] = True
    at = torch.arange(j)
    away = at[j - i :, None] - at
    if causal:
        return (pairs | (away < mechanism.window)) & (away >= 0)
    return pairs | (away.abs() <= mechanism.window) & (mechanism.window > 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_choice_is_the_rule(mechanism, causal):
    """And no pair counts twice, whatever the rounds and the window have in common."""
    q, k, v = qkv(Shape(b=2, h=4, g=2, i=33, j=47), "rule", causal)
    pairs = pairs_of(mechanism, q, k, Mask(causal=causal))
    assert torch.equal(pairs, expected_pairs(mechanism, q, k, causal))
    for path in ("reference", "torch"):
        o = attend(q, k, v, mechanism, Mask(causal=causal), backend=path)
        assert_near(o, naive_attention(q, k, v, pairs, Score()), path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mechanism", OTHERS, ids=str)
def test_contract_of_other_fields(mechanism, causal):
    for case in contract.grid()[3::9]:
        contract.check_fast_is_reference(mechanism, case)
    contract.check_full_budget(mechanism, causal, 20, "torch")
    if causal:
        contract.check_future(mechanism, Shape(j=97), (0, 31, 80), "torch")
        contract.check_decoding(mechanism, Mask(causal=True), "torch")


def test_heads_keep_their_rotations_on_every_rank():
    q, k, v = qkv(Shape(h=8, g=4, j=80), "ranks")
    mechanism = Hashed(bits=3, rounds=2, cap=5, window=1)
    whole = attend(q, k, v, mechanism)
    parts = [
        attend(
            q[:, n : n + 4], k[:, n // 2 : n // 2 + 2], v[:, n // 2 : n // 2 + 2], mechanism, score=Score(first_head=n)
        )
        for n in (0, 4)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_rotations():
    one = rotations(3, 1, 4, 24, 4)
    assert torch.equal(rotations(3, 1, 2, 24, 4), one[:, :16]), "a round depends on how many there are"
    for r in range(4):
        turn = one[:, 8 * r : 8 * r + 8]
        assert_near(turn.mT @ turn, torch.eye(8, dtype=torch.float64), "columns")
    different = [rotations(*x, 1, 24, 4) for x in ((3, 1), (3, 2), (4, 1), (-3, 1))] + [one[:, 8:16]]
    for n, x in enumerate(different):
        assert all((x.mT @ y).abs().max() < 0.9 for y in different[n + 1 :]), "two rotations are alike"
    assert rotations(0, 0, 2, 4, 9).shape == (4, 2 * (128 + 1))
    many = torch.cat([rotations(0, head, 8, 16, 5) for head in range(20)], -1)
    assert abs(many.mean()) < 0.02
    assert many.flatten(1).mean(1).abs().max() < 0.03, "directions have a bias"


def work(queries, keys, cap, causal, size=64):
    """Scores that are computed for the buckets given."""
    (_, b, h, i), (g, j) = queries.shape, keys.shape[2:]
    sizes = Sizes(b, h, g, i, j, causal)
    runs = Runs.of(queries, keys, cap, causal).join(Runs.window(sizes, 1, torch.arange(j)))
    lists = run_lists(sizes, runs, (cap, 1), size)
    return sum(tiles.rows.numel() * tiles.keys.shape[1] for tiles in lists)


@pytest.mark.parametrize("causal", [False, True])
def test_work_is_linear_whatever_the_buckets(causal):
    for kind in ("one", "random", "apart", "few queries"):
        done = []
        for j in (2048, 4096, 8192):
            random = generator(kind, j)
            keys = torch.randint(16, (1, 1, 1, j), generator=random)
            queries = {
                "one": torch.zeros_like(keys),
                "random": torch.randint(16, keys.shape, generator=random),
                "apart": torch.full_like(keys, 64),
                "few queries": (torch.arange(j) % 100 == 0).long().view(keys.shape),
            }[kind]
            keys = torch.zeros_like(keys) if kind in ("one", "few queries") else keys
            done.append(work(queries, keys, 64, causal))
        assert done[2] <= 4.6 * done[0], f"{kind}: {done}"
        assert done[2] <= 8192 * 64 * 6, f"{kind}: {done}"


def structured(j, seed):
    """[1 2 j 16]: keys around 60 topics in random order; queries ask for their own token's topic."""
    random = generator("structured", seed)
    centres = 2.5 * torch.randn(2, 60, 16, dtype=torch.float64, generator=random)
    topic = torch.randint(60, (j,), generator=random)
    noise = torch.randn(2, 2, j, 16, dtype=torch.float64, generator=random)
    k = centres[:, topic] + 0.5 * noise[0]
    return (centres[:, topic] + 0.5 * noise[1])[None], k[None]


def recall(mechanism, q, k, causal):
    """Share of the dense attention mass, and of the pairs, that the mechanism reads."""
    earlier = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    earlier = earlier.tril() if causal else earlier
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~earlier, float("-inf")).softmax(-1)
    pairs = pairs_of(mechanism, q, k, Mask(causal=causal))
    return (weights * pairs).sum(-1).mean().item(), (pairs.double().mean() / earlier.double().mean()).item()


@pytest.mark.parametrize("causal", [False, True])
def test_recall_grows_with_rounds_and_beats_a_window(causal):
    q, k = structured(1200, causal)
    found = [recall(Hashed(bits=6, rounds=rounds, cap=32, window=1), q, k, causal) for rounds in (1, 2, 4, 8)]
    masses, densities = zip(*found, strict=True)
    assert all(more > less + 0.02 for less, more in zip(masses, masses[1:], strict=False)), masses
    assert masses[-1] > 0.8, masses
    window = round(1.1 * densities[1] * 1200 / 2)  # more pairs than two rounds read
    near, density = recall(Hashed(bits=16, rounds=1, cap=1, window=window), q, k, causal)
    assert density > densities[1]
    assert masses[1] > 3 * near, (masses, near)


def test_tiles_follow_the_size_of_buckets():
    assert tile_size(16384, 7) == 64
    assert tile_size(4096, 6) == 32
    assert tile_size(10, 16) == 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_buckets_are_nearest_corners(dtype):
    """Up to projections that rounding cannot tell apart."""
    random = generator("corners", str(dtype))
    for bits in (0, 1, 4, 8, 11):
        x = torch.randn(2, 3, 50, 8, dtype=torch.float64, generator=random).to(dtype)
        turns = torch.randn(3, 8, 2 * directions(bits), dtype=torch.float64, generator=random)
        wide = torch.promote_types(dtype, torch.float32)
        turns = turns.to(wide)
        found = buckets(x, turns, bits, 2)
        assert found.shape == (2, 2, 3, 50)
        y, at, number = x.to(wide) @ turns, 0, 0
        for r in range(2):
            number, sure = torch.zeros(2, 3, 50, dtype=torch.int32), torch.ones(2, 3, 50, dtype=torch.bool)
            for part in parts(bits):
                z = y[..., at : at + 2 ** (part - 1)]
                z, at = torch.cat([z, -z], -1), at + 2 ** (part - 1)
                first, second = z.topk(2).values.unbind(-1)
                sure &= second < first * (1 - 1e-4)
                number = number * 2**part + z.argmax(-1).int()
            assert torch.equal(found[r][sure], number[sure])
            assert sure.double().mean() > 0.95


@pytest.mark.parametrize(
    "fields",
    [{"bits": -1}, {"bits": MOST_BITS + 1}, {"rounds": 0}, {"rounds": 65}, {"cap": 0}, {"window": -1}, {"seed": 1.5}],
    ids=str,
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Hashed(**fields)
