"""Peak memory: what a call holds at once, its result included, however it is read."""

import subprocess
import sys

import pytest
import torch

from hf_tfast.benchmarking import memory
from hf_tfast.benchmarking.memory import available_memory, peak_memory

MIB = 2**20


@pytest.fixture(params=["kernel", "sampled"])
def method(request, monkeypatch):
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_resettable", lambda: False)
    elif not memory._resettable():
        pytest.skip("this kernel does not reset the peak")
    return request.param


def hold(mib, rounds=1):
    for _ in range(rounds):
        x = torch.ones(mib * MIB // 4)
        x.mul_(2).add_(1)  # held long enough for a sample
    return x


@pytest.mark.parametrize("mib", [64, 200])
def test_a_known_size(method, mib):
    peak = peak_memory(lambda: hold(mib))
    assert peak.method == method
    assert peak.bytes == pytest.approx(mib * MIB, rel=0.1)


ALONE = """
import torch
from hf_tfast.benchmarking import memory
if {method!r} == "sampled":
    memory._resettable = lambda: False
def one_after_the_other():
    for _ in range(4):
        torch.ones(64 * 2**20 // 4).mul_(2).add_(1)
peak = memory.peak_memory(one_after_the_other)
assert peak.method == {method!r}
print(peak.bytes)
"""


def test_the_peak_and_not_the_sum(method):
    """In a process of its own: what other threads of a test run allocate meanwhile would be counted too."""
    done = subprocess.run([sys.executable, "-c", ALONE.format(method=method)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * MIB


def test_what_is_freed_inside_counts(method):
    def inner():
        hold(160, rounds=1)
        return torch.ones(1)

    assert peak_memory(inner).bytes > 130 * MIB


def test_what_was_held_before_does_not_count(method):
    held = hold(200)
    assert peak_memory(lambda: held.sum()).bytes < 40 * MIB


def test_an_earlier_peak_is_forgotten(method):
    hold(300)
    assert peak_memory(lambda: hold(32)).bytes < 80 * MIB


def test_errors_pass_through(method):
    def fails():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        peak_memory(fails)


def test_available():
    assert available_memory() > 0


@pytest.mark.gpu
def test_cuda():
    peak = peak_memory(lambda: torch.ones(64 * MIB // 4, device="cuda"), "cuda")
    assert (peak.bytes, peak.method) == (64 * MIB, "cuda")
