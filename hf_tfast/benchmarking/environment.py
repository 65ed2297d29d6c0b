"""What a figure was measured on: processor, memory, accelerator, versions, commit and command."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

# Instruction sets that decide how fast matrix products of a narrow type are.
TELLING = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """The record that goes beside every measurement; plain values that JSON can hold."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpu_flags": sorted(_cpu_flags() & set(TELLING)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_in_use": round(psutil.cpu_percent(interval=0.3) / 100, 2),
        "ram_gib": round(_total_memory() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def busy(record: dict[str, Any]) -> str | None:
    """A warning where others used over a quarter of the processor when the record was made, else None."""
    if record["cpu_in_use"] <= 0.25:
        return None
    return (
        f"this machine was busy at the start ({record['cpu_in_use']:.0%} of the processor in use): "
        "timings are worth little, of short calls least"
    )


def describe(record: dict[str, Any]) -> str:
    """One line of Markdown for the foot of a table, from a record of `environment`."""
    gpus = "".join(f", {name}" for name in dict.fromkeys(record["gpus"]))
    flags = ", ".join(record["cpu_flags"])
    versions = record["versions"]
    return (
        f"{record['cpu']} ({flags}), {record['cores']} cores, {record['threads']} threads, "
        f"{record['ram_gib']} GiB{gpus}; "
        f"Python {record['python']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"commit {record['commit'] or 'unknown'}; {record['time']}"
    )


def commit() -> str | None:
    """The commit of the checkout this package runs from, "+" when files differ from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top) / package.name != package:  # installed inside somebody else's repository
        return None
    head = _git(package, "rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _git(package, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_info(*keys: str) -> str | None:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _cpu_model() -> str:
    return _cpu_info("model name", "Hardware") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpu_info("flags", "Features") or "").split())


def _total_memory() -> int:
    return int(psutil.virtual_memory().total)
