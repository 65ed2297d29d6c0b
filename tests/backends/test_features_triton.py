"""The kernel of random features: equal to plain torch, inside the whole scan too, forward and backward.

Without a device in Triton's interpreter, in a process of its own, as in test_codes_triton.py.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_tfast.attention import Mask, Score, attend
from hf_tfast.attention.performer import MOST_FUSED, Performer
from hf_tfast.backends import triton_kernels
from hf_tfast.backends.scan_wide import WideScan
from hf_tfast.testing import Shape, assert_near, generator, qkv, with_gradients

INTERPRETED = os.environ.get(triton_kernels.INTERPRETER) == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")


def plain(x, w, half, dtype):
    """What the kernel computes, written out in float64."""
    logits = x.double() @ w.double()
    top = logits.amax(-1, keepdim=True)
    level = top[..., 0] * torch.tensor(2.0, dtype=torch.float64).log() - half * x.double().square().sum(-1)
    return torch.exp2(logits - top).to(dtype), level


def check(n, m, d, r, dtype, device):
    random = generator(n, m, d, r)
    x, w = torch.randn(n, m, d, generator=random).to(device), 2 * torch.randn(n, d, r, generator=random).to(device)
    for part in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        p, level = triton_kernels.kernel("features_triton").features(part, w, 0.3, dtype)
        expected, expected_level = plain(x, w, 0.3, dtype)
        assert p.dtype == dtype
        assert_near(p.double(), expected.double(), "features", 1e-5 if dtype == torch.float32 else 1e-2)
        assert_near(level.double(), expected_level, "level", 1e-5)


@interpreted
@pytest.mark.parametrize(("n", "m", "d", "r"), [(2, 70, 16, 24), (1, 5, 40, 16), (3, 64, 32, 7)])
def test_equals_plain_torch(n, m, d, r):
    check(n, m, d, r, torch.float32, "cpu")


@interpreted
def test_half_precision():
    check(1, 40, 16, 12, torch.float16, "cpu")


@interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_inside_a_performer(causal):
    q, k, v = qkv(Shape(b=1, h=2, g=1, i=150, j=200, d=8), "whole", dtype=torch.float32)
    score, mask = Score(sinks=torch.randn(2, generator=generator("s"))), Mask(causal=causal)
    through = lambda way: lambda q, k, v, s: attend(q, k, v, Performer(features=24), mask, s, backend=way)  # noqa: E731
    expected = with_gradients(through("torch"), q, k, v, score)
    for name, x in with_gradients(through("triton"), q, k, v, score).items():
        assert_near(x, expected[name], name, 1e-4)


@interpreted
def test_inside_the_wide_scan():
    q, k, v = qkv(Shape(b=1, h=2, g=1, j=150), "wide", dtype=torch.float32)
    w = torch.randn(2, 12, 8, generator=generator("wide"))
    found, expected = (WideScan.apply(q, k, v, w, 0.3, False, fused) for fused in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, "wide", 1e-5)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False, env={**os.environ, triton_kernels.INTERPRETER: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 7


def test_who_has_no_kernel(monkeypatch):
    q, k, v = qkv(Shape(j=20, d=16), "none", dtype=torch.float32)
    monkeypatch.delenv(triton_kernels.INTERPRETER, raising=False)
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="performer cannot run on backend 'triton': .* on CUDA only"):
        attend(q, k, v, Performer(), backend="triton")
    with pytest.raises(ValueError, match=f"up to {MOST_FUSED} features, not 600"):
        attend(q, k, v, Performer(features=600), backend="triton")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of compilers
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "d", "r"), [(2, 700, 64, 256), (16, 1000, 128, 256), (1, 33, 48, 500)])
def test_on_a_device(n, m, d, r, dtype):
    check(n, m, d, r, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of compilers
@needs_triton
@pytest.mark.parametrize("causal", [True, False])
def test_performer_on_a_device(causal):
    q, k, v = qkv(Shape(b=2, i=900, j=1500, d=64), "device", dtype=torch.float32, device="cuda")
    mask, score = Mask(causal=causal), Score(sinks=torch.randn(4, device="cuda"))
    through = lambda way: lambda q, k, v, s: attend(q, k, v, Performer(features=64), mask, s, backend=way)  # noqa: E731
    expected = with_gradients(through("reference"), q, k, v, score)
    for name, x in with_gradients(through("triton"), q, k, v, score).items():
        assert_near(x, expected[name], name, 2e-3)
