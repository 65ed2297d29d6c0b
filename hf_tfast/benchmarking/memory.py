"""Peak memory of one call, beside what was held before it.

CPU     The kernel keeps the peak of the resident set (VmHWM). Writing 5 to /proc/self/clear_refs sets it back to the
        present, so the growth during one call can be read exactly, library scratch included. Free memory that the C
        library holds on to is given back first (malloc_trim), else a call could grow into it unseen. Where the kernel
        does not offer this, a thread samples the resident set every millisecond and short peaks can slip through.
CUDA    The caching allocator's own peak.
"""

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """`bytes` above what was held before the call; `method` is "kernel", "sampled" or "cuda"."""

    bytes: int
    method: str


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> Peak:
    """Run `call` once and return the memory it needed at its peak, its result included."""
    if torch.device(device).type == "cuda":
        return _cuda_peak(call, torch.device(device))
    gc.collect()
    with suppress(OSError, AttributeError):  # no glibc: nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _kernel_peak(call) if _resettable() else _sampled_peak(call)


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that a new allocation can hope for."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return int(psutil.virtual_memory().available)


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, "cuda")


def _kernel_peak(call: Callable[[], Any]) -> Peak:
    _CLEAR.write_text("5")
    before = _status("VmHWM")
    call()
    return Peak(max(_status("VmHWM") - before, 0), "kernel")


def _sampled_peak(call: Callable[[], Any]) -> Peak:
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return Peak(max(peak, process.memory_info().rss) - before, "sampled")


def _resettable() -> bool:
    try:
        _CLEAR.write_text("5")
        return _status("VmHWM") > 0
    except (OSError, ValueError):
        return False


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {key}")
