"""Quantized: error per scheme, codes, smoothing, rounding of weights and sums, integer products, storage."""

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.dense import Dense
from hf_tfast.attention.quantized import Quantized
from hf_tfast.backends import codes
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients
from tests.attention import contract

MAPS = pytest.mark.parametrize(("scheme", "bits"), [(s, b) for s in codes.SCHEMES for b in codes.BITS])
VARIANTS = {
    "4 bits": Quantized(bits=4, smooth=16),
    "log": Quantized(bits=4, scheme="log", smooth=0),
    "sine": Quantized(scheme="sine", smooth=5),
    "dynamic": Quantized(scheme="dynamic"),
    "integers": Quantized(queries=True, smooth=16),
    "integers, no means": Quantized(queries=True, smooth=0, bits=4),
    "queries by table": Quantized(queries=True, scheme="sine", smooth=16),
    "keys alone": Quantized(values=False, smooth=16),
    "values alone": Quantized(keys=False),
    "weights": Quantized(weights="bfloat16", smooth=16),
    "weights and sums": Quantized(weights="float16", sums="bfloat16", smooth=16),
}


@MAPS
def test_every_number_is_within_half_a_step(scheme, bits):
    x = torch.randn(3, 40, 64, generator=generator(scheme, bits), dtype=torch.float64) * 7
    code, scale = codes.encode(x, scheme, bits)
    table = codes.levels(scheme, bits)
    above = torch.searchsorted(table, (x / scale).clamp(table[0], table[-1]).contiguous()).clamp(1, len(table) - 1)
    step = torch.maximum(table[above] - table[above - 1], -1.0 - table[0].expand_as(x)) * scale
    step = torch.maximum(step, 2 * (table[0] * scale - x))  # below the lowest level: dynamic has none at -1
    off = (codes.decode(code, scale, scheme, bits) - x).abs()
    assert bool((off <= step / 2 + 1e-12).all())
    assert off.max() > 0.2 * step.max() / 2, "the bound is not met by accident: errors reach its order"


@MAPS
def test_levels_are_their_own_codes(scheme, bits):
    table = codes.levels(scheme, bits)
    assert torch.equal(table, table.sort().values)
    assert (len(table), table[-1]) == (2**bits - (scheme != "dynamic"), 1.0)
    code, scale = codes.encode(table, scheme, bits)
    assert torch.equal(code.long(), torch.arange(len(table)) - len(table) // 2)
    assert_near(codes.decode(code, scale, scheme, bits), table, "levels")


def test_levels_of_each_scheme():
    assert torch.equal(codes.levels("log", 8)[-20:].log2(), torch.arange(-19.0, 1.0, dtype=torch.float64))
    angles = codes.levels("sine", 8).asin().diff()
    assert_near(angles, torch.full_like(angles, torch.pi / 2 / 127), "angles of the sine levels", 1e-6)
    steps = codes.levels("linear", 4).diff()
    assert_near(steps, torch.full_like(steps, 1 / 7), "linear steps")


@pytest.mark.parametrize("bits", codes.BITS)
def test_dynamic_is_the_map_of_bitsandbytes(bits):
    create = pytest.importorskip("bitsandbytes.functional").create_dynamic_map
    theirs = create(signed=True, max_exponent_bits=bits - 1, total_bits=bits).double()
    assert_near(codes.levels("dynamic", bits), torch.unique(theirs), "dynamic map", 1e-7)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("score", ["plain", "everything"])
def test_fast_is_reference(name, causal, score):
    q, k, v = qkv(Shape(i=70, j=90, e=8), name, causal)
    paths = [contract.through_attend(VARIANTS[name], Mask(causal=causal), path) for path in ("torch", "reference")]
    one, other = (with_gradients(path, q, k, v, contract.make_score(score, 4)) for path in paths)
    contract.same(one, other, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_never_reads_the_future(name):
    contract.check_future(VARIANTS[name], Shape(b=1, j=70), (15, 16, 40), "torch")


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_continues_prefill(name):
    contract.check_decoding(VARIANTS[name], Mask(causal=True), "torch")


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.35)])
def test_near_dense(bits, most):
    q, k, v = qkv(Shape(j=300, d=64), "near")
    dense = attend(q, k, v, Dense(), backend="reference")
    o = attend(q, k, v, Quantized(bits=bits))
    off = ((o - dense).norm() / dense.norm()).item()
    assert most / 20 < off < most


def test_smoothing_saves_levels_from_a_common_offset():
    q, k, v = qkv(Shape(j=256, d=64), "offset")
    k = k + 20 * torch.randn(1, 2, 1, 64, generator=generator("offset"), dtype=torch.float64)

    def error(smooth):
        mechanism = Quantized(smooth=smooth)
        rounded = mechanism._rounded(q, k, v, mechanism.choose(q, k, Mask(causal=True)), Score())[1]
        return (rounded - k)[:, :, 16:].norm()  # the first block has no earlier one

    assert error(16) < 0.15 * error(0)


def test_gradient_is_dense_at_the_rounded_numbers():
    """Straight-through: the gradients are those of dense attention at what the codes stand for, which are not zero."""
    q, k, v = qkv(Shape(j=40), "straight")
    mechanism = Quantized(smooth=8, bits=4)
    chosen = mechanism.choose(q, k, Mask())
    _, k_, v_, _ = mechanism._rounded(q, k, v, chosen, Score())
    assert (k_ - k).abs().max() > 0.01
    got = with_gradients(lambda q, k, v, s: attend(q, k, v, mechanism, score=s), q, k, v, Score())
    dense = lambda q, k, v, s: attend(q, k, v, Dense(), score=s, backend="reference")  # noqa: E731
    contract.same(got, with_gradients(dense, q, k_, v_, Score()), "straight-through")


def test_weights_and_sums_are_rounded_as_asked():
    q, k, v = qkv(Shape(j=300, d=16), "rounding", dtype=torch.float32)
    plain = attend(q, k, v, Quantized())
    off = [
        (attend(q, k, v, Quantized(**fields)) - plain).abs().max().item()
        for fields in ({"weights": "float16"}, {"weights": "bfloat16"}, {"sums": "bfloat16"})
    ]
    assert 1e-7 < off[0] < off[1] < 1e-2
    assert 1e-4 < off[2] < 2e-2


@pytest.mark.parametrize("shape", [(1, 9, 8), (7, 3, 5), (33, 64, 64)])
def test_integer_products_are_exact(shape):
    m, n, d = shape
    a, b = (torch.randint(-127, 128, (2, 3, x, d), generator=generator(x), dtype=torch.int8) for x in (m, n))
    assert torch.equal(codes.multiply(a, b).long(), a.long() @ b.long().mT)


@pytest.mark.parametrize("bits", codes.BITS)
def test_pack(bits):
    code = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5, 16), generator=generator(bits), dtype=torch.int8)
    stored = codes.pack(code, bits)
    assert stored.nbytes * 8 == code.numel() * bits
    assert torch.equal(codes.unpack(stored, bits), code)


def test_4_bit_storage_needs_an_even_width():
    with pytest.raises(ValueError, match="even, got 3"):
        codes.pack(torch.zeros(2, 3, dtype=torch.int8), 4)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.56), (4, 0.31)])
def test_stored_bytes_and_numbers(bits, most):
    """At head width 64 a stored token takes at most 0.56 of its bf16 bytes, and reads back as the mechanism rounds it,
    however it was appended."""
    mechanism = Quantized(bits=bits)
    _, k, v = qkv(Shape(j=1000, d=64), "stored", dtype=torch.bfloat16)
    store = mechanism.store()
    for n, m in ((0, 300), (300, 301), (301, 302), (302, 700), (700, 1000)):
        store.append(k[:, :, n:m], v[:, :, n:m])
    assert store.nbytes <= most * (k.nbytes + v.nbytes)
    keys, values = store.read()
    _, k_, v_, _ = mechanism._rounded(k, k, v, mechanism.choose(k, k, Mask()), Score())
    assert len(store) == 1000
    flips = (keys - k_).abs() > 1e-3  # sums in another order: a number between two levels may fall to the other
    assert flips.float().mean() < 1e-3
    assert_near(values, v_, "values")


def test_one_outlier_and_equal_keys_stay_finite():
    q, k, v = qkv(Shape(j=64), "outlier", dtype=torch.float32)
    k[:, :, 5], v[:, :, 7] = 1e30, -1e30
    for scheme in codes.SCHEMES:
        o = attend(q, k, v, Quantized(scheme=scheme), Mask(causal=True))
        assert bool(o.isfinite().all())
    zeros = torch.zeros_like(k)
    assert_near(attend(q, zeros, v * 0, Quantized()), zeros.repeat_interleave(2, 1), "zeros")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 5}, "bits must be one of 8, 4, got 5"),
        ({"bits": True}, "bits must be one of 8, 4, got True"),
        ({"scheme": "cubic"}, "unknown scheme 'cubic'; expected one of linear, log, sine, dynamic"),
        ({"smooth": -1}, "smooth must be a whole number of at least 0, got -1"),
        ({"weights": "int8"}, "weights must be one of float32, bfloat16, float16, got 'int8'"),
        ({"sums": "fp16"}, "sums must be one of"),
        ({"keys": 1}, "keys must be true or false, got 1"),
        ({"queries": True, "keys": False}, "needs keys=True"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        Quantized(**fields)
