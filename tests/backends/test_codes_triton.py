"""The kernel of Quantized: equal to the reference, whatever is a code and however lengths fall.

Without a device its numbers are checked in Triton's interpreter, in a process of its own: the switch works only before
Triton is imported. On a device (`-m gpu`) the same cases run compiled.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend, choose_backend
from hf_tfast.attention.quantized import Quantized
from hf_tfast.backends import triton_kernels
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients

INTERPRETED = os.environ.get(triton_kernels.INTERPRETER) == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
CASES = {
    "codes": (Quantized(smooth=32), Shape(b=2, h=4, g=2, i=50, j=70, d=16), True),
    "means out of step": (Quantized(smooth=5), Shape(b=1, h=2, g=1, i=40, j=70, d=16), True),
    "integers": (Quantized(queries=True, smooth=32), Shape(b=1, h=4, g=2, j=65, d=24, e=40), True),
    "integers, bidirectional": (Quantized(queries=True, smooth=64), Shape(b=1, h=2, g=2, i=33, j=64, d=32), False),
    "4 bits, no means": (Quantized(bits=4, smooth=0, queries=True), Shape(b=1, h=2, g=1, i=1, j=40, d=8), True),
    "keys alone": (Quantized(values=False, smooth=16), Shape(b=1, h=2, g=1, j=48, d=16), False),
    "values alone": (Quantized(keys=False), Shape(b=1, h=2, g=2, i=17, j=80, d=16), True),
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def same(name, dtype, device, transposed=False):
    mechanism, shape, causal = CASES[name]
    q, k, v = qkv(shape, name, str(dtype), dtype=dtype, device=device, transposed=transposed)
    k = k + 3 * torch.randn(shape.d, generator=generator(name)).to(k)  # what smoothing takes off
    sinks = torch.randn(shape.h, generator=generator(name, "sinks")).to(device)
    after_a_gap = Mask(causal=True, start=7, kept=3) if causal else Mask()
    for mask, score in (
        (Mask(causal=causal), Score()),
        (after_a_gap, Score(softcap=4.0, sinks=sinks, scale=0.3)),
    ):
        choice = mechanism.choose(q, k, mask)
        expected = mechanism.reference(q.float(), k.float(), v.float(), mask, score, choice)
        found = mechanism.fast(q, k, v, mask, score, "triton", choice)
        assert found.dtype == dtype
        assert_near(found.float(), expected, f"{name}, {mask}", TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, monkeypatch):
    kernels = triton_kernels.kernel("codes_triton")
    monkeypatch.setattr(kernels, "_tile", lambda dtype, width: kernels.Tile(16, 32))
    same(name, torch.float32, "cpu", transposed=name == "codes")


@interpreted
def test_half_precision():
    """With the tiles of a device. The interpreter cannot multiply bf16: it takes the bits for integers."""
    same("integers", torch.float16, "cpu")


@interpreted
def test_rows_of_a_batch_and_gradients(monkeypatch):
    """Padding through `attend`; the gradient is the one that plain torch has."""
    kernels = triton_kernels.kernel("codes_triton")
    monkeypatch.setattr(kernels, "_tile", lambda dtype, width: kernels.Tile(16, 16))
    q, k, v = qkv(Shape(b=2, h=2, g=1, j=40, d=8), "rows", dtype=torch.float32)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :9], valid[1, 30:] = False, False
    score, mechanism = Score(sinks=torch.randn(2, generator=generator("s"))), Quantized(smooth=16, queries=True)
    through = lambda way: lambda q, k, v, s: attend(q, k, v, mechanism, Mask(causal=True, valid=valid), s, backend=way)  # noqa: E731
    expected = with_gradients(through("torch"), q, k, v, score)
    for name, x in with_gradients(through("triton"), q, k, v, score).items():
        assert_near(x, expected[name], name, 2e-5)


@interpreted
def test_a_wrong_mean_shows():
    """A kernel that mixed up the means of blocks would be caught: they carry weight in these cases."""
    mechanism, shape, causal = CASES["means out of step"]
    q, k, v = qkv(shape, "wrong", dtype=torch.float32)
    k = k + 3 * torch.randn(shape.d, generator=generator("wrong"))
    choice = mechanism.choose(q, k, Mask(causal=causal))
    other = choice._replace(block=choice.block.roll(1))
    right, wrong = (mechanism.fast(q, k, v, Mask(causal=causal), Score(), "triton", c) for c in (choice, other))
    assert (right - wrong).abs().max() > 0.05


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_in_the_interpreter():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], cwd=root, capture_output=True,
        text=True, check=False, env={**os.environ, triton_kernels.INTERPRETER: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "failed" not in done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= len(CASES) + 4


def test_who_has_no_kernel(monkeypatch):
    q, k, v = qkv(Shape(j=20, d=16), "none", dtype=torch.float32)
    monkeypatch.delenv(triton_kernels.INTERPRETER, raising=False)
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantized cannot run on backend 'triton': Triton is not installed: pip"):
        attend(q, k, v, Quantized(), backend="triton")
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="run on CUDA only; these tensors are on cpu"):
        attend(q, k, v, Quantized(), backend="triton")
    for mechanism, score, text in (
        (Quantized(scheme="sine"), Score(), "linear"),
        (Quantized(weights="bfloat16"), Score(), "weights"),
        (Quantized(), Score(dropout=0.1), "dropout"),
    ):
        with pytest.raises(ValueError, match=f"quantized cannot run on backend 'triton': .*{text}"):
            attend(q, k, v, mechanism, score=score, backend="triton")
    assert choose_backend(Quantized(), "auto", q, k, v) == "torch"
    monkeypatch.setattr(triton_kernels, "import_module", lambda name: exec("raise ImportError('no module')"))
    with pytest.raises(ValueError, match=r"cannot be loaded \(no module\)"):
        triton_kernels.kernel("codes_triton")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of compilers
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name, dtype):
    same(name, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of compilers
@needs_triton
def test_long_on_a_device():
    q, k, v = qkv(Shape(b=1, h=16, g=4, j=5000, d=128), "long", dtype=torch.bfloat16, device="cuda")
    for mechanism in (Quantized(), replace(Quantized(), queries=True)):
        one, other = (attend(q, k, v, mechanism, Mask(causal=True), backend=way) for way in ("triton", "torch"))
        assert_near(one.float(), other.float(), str(mechanism), 3e-2)
