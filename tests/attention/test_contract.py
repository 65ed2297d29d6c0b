"""What every mechanism must keep, asked of each that is found: fast is reference, one predicate, no look ahead,
decoding, full budget. The checks are in contract.py, and test_seeded_faults.py shows that they can fail."""

import pytest
import torch

from hf_tfast.attention import Mask, mechanisms
from hf_tfast.testing import Shape
from tests.attention import contract

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EVERY = pytest.mark.parametrize("cls", mechanisms().values(), ids=mechanisms().keys())
DIRECTION = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
PATH = pytest.mark.parametrize("path", ["torch", "reference"], ids=["fast", "definition"])


def small(cls, causal=False):
    """The mechanism with its small fields; skips what it has no causal form for."""
    mechanism = contract.small(cls)
    if causal and not mechanism.causal:
        pytest.skip("no causal form: test_refuses_causal")
    return mechanism


@EVERY
@pytest.mark.parametrize("case", contract.grid(), ids=str)
def test_fast_is_reference(cls, case):
    contract.check_fast_is_reference(small(cls, case.causal), case)


@EVERY
@DIRECTION
def test_layouts(cls, causal):
    contract.check_layouts(small(cls, causal), causal)


@EVERY
@DIRECTION
@pytest.mark.parametrize(
    "shape", [Shape(b=1, h=2, g=1, j=777), Shape(b=1, h=2, g=2, i=300, j=1025)], ids=["777", "1025"]
)
@pytest.mark.parametrize("fields", ["small", "usual"])
def test_long(cls, causal, shape, fields):
    mechanism = getattr(contract, fields)(cls)
    if causal and not mechanism.causal:
        pytest.skip("no causal form")
    contract.check_long(mechanism, shape, causal)


@EVERY
@DIRECTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_low_precision(cls, causal, dtype):
    contract.check_low_precision(small(cls, causal), dtype, causal)


@EVERY
@DIRECTION
@pytest.mark.parametrize("gap", [(0, 0), (20, 3)], ids=["whole", "gap"])
def test_pattern(cls, causal, gap):
    mechanism = small(cls, causal)
    if not contract.is_pattern(mechanism):
        pytest.skip("not a pattern of pairs")
    contract.check_pattern(mechanism, Mask(causal=causal, start=gap[0], kept=gap[1]))


@EVERY
@PATH
def test_never_reads_the_future(cls, path):
    mechanism = small(cls, True)
    contract.check_future(mechanism, Shape(j=97), (0, 7, 31, 32, 33, 63, 64, 80), path)
    contract.check_future(mechanism, Shape(i=60, j=130), (70, 95, 96, 127), path)


@EVERY
def test_never_reads_the_future_over_tiles(cls):
    mechanism = contract.usual(cls)
    if not mechanism.causal:
        pytest.skip("no causal form")
    contract.check_future(mechanism, Shape(b=1, h=2, g=1, j=700), (63, 300, 511, 512), "torch")


@EVERY
def test_refuses_causal(cls):
    if cls.causal:
        pytest.skip("has a causal form")
    contract.check_refuses_causal(contract.small(cls))


@EVERY
@PATH
@pytest.mark.parametrize("kind", ["none", "left", "holes", "segments"])
def test_decoding_continues_prefill(cls, path, kind):
    contract.check_decoding(small(cls, True), contract.make_mask(kind, True, 2, 97, "decoding"), path)


@EVERY
def test_queries_are_the_last_positions(cls):
    mechanism = contract.small(cls)
    if not (contract.is_pattern(mechanism) and mechanism.causal):
        pytest.skip("without causality its numbers may depend on all queries")
    contract.check_decoding(mechanism, Mask(), "torch")


@EVERY
@PATH
def test_dropped_keys(cls, path):
    contract.check_dropped_keys(small(cls, True), path)


@EVERY
@DIRECTION
@PATH
@pytest.mark.parametrize("i", [75, 20])
def test_full_budget(cls, causal, path, i):
    mechanism = small(cls, causal)
    if mechanism.full(75) is None:
        pytest.skip("an approximation at every budget")
    contract.check_full_budget(mechanism, causal, i, path)
