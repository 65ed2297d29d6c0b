"""What `tfast estimate` says of steps on this machine, beside what they took: time, memory and bytes, by layout.

    python -m hf_tfast.training.estimate_report --out docs/results/parallel_steps --update docs/scale.md

measures what the formulas need of this machine (matrix products, memory, gloo; alone and with two processes at once),
then trains a small model for a few steps in one process and by every layout of two, one thread each. The efficiency is
fitted to the step of one process, so that one is no prediction; the others are. `--only` renews some layouts.

Bytes are those that the kernel counts on the loopback device, halved: what one of two processes sends, with TCP's own.
Everything else that talks over it while this runs is counted too.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, TrainerCallback

from ..attention.window import Window
from ..benchmarking.environment import describe, environment
from ..benchmarking.folder import new_folder
from ..benchmarking.pages import renew
from ..parallel.estimate import Estimate, Run, Shares, estimate
from ..parallel.estimate_hardware import Hardware
from ..parallel.estimate_model import Sizes
from .scaling_report import ROWS, TEXTS, WIDE, launch, train
from .states import held_bytes

Record = dict[str, Any]
LENGTH, WARM = 2048, 2  # tokens of a row; steps before the first that counts
MECHANISM = Window(window=64)  # of scaling_report's trainings
LAYOUTS: dict[str, tuple[Record, Shares]] = {  # name: (options, what the estimate is told)
    "one process": ({"gradient_accumulation_steps": ROWS}, Shares()),
    "data parallel": ({}, Shares(replicas=2)),
    "FSDP2": ({"shard": 2}, Shares(shard=2)),
    "tensor parallel": ({"tensor_parallel": 2, "gradient_accumulation_steps": ROWS}, Shares(tensor=2)),
    "sequence parallel": ({"sequence_parallel": 2, "gradient_accumulation_steps": ROWS}, Shares(sequence=2)),
    "pipeline": ({"pipeline_parallel": 2, "per_device_train_batch_size": ROWS}, Shares(pipeline=2)),
}
_COUNTERS = Path("/proc/net/dev")


class Watch(TrainerCallback):
    """Seconds of every step (from its end to the end of the one before), bytes over the loopback, and what is held."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.counted: list[int] = []
        self.held = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.counted.append(loopback_bytes())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.held = held_bytes(kwargs["model"], getattr(optimizer, "optimizer", optimizer))

    def found(self) -> Record:
        seconds = [b - a for a, b in zip(self.ends[WARM - 1 :], self.ends[WARM:], strict=False)]
        counted = (self.counted[-1] - self.counted[WARM - 1]) / len(seconds)
        return {"seconds": seconds, "bytes_of_both": counted, "held": self.held}


def loopback_bytes() -> int:
    """That the loopback device has carried since the machine began. OSError where the kernel does not tell."""
    for line in _COUNTERS.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    raise OSError(f"{_COUNTERS} has no loopback device")


def steps(folder: str, count: int) -> None:
    """Worker: the layout that the folder is named after."""
    options, _ = LAYOUTS[Path(folder).name]
    data = {**TEXTS, "length": LENGTH, "validation_sequences": 2}
    more = {"max_steps": WARM + count, "per_device_train_batch_size": 1, "eval_strategy": "no", "logging_steps": 1}
    watch = Watch()
    record = train(folder, WIDE, data, {**more, **options}, [watch])
    if record:  # of the first process
        found = {**watch.found(), "step_peak": record["step_peak_bytes"], "parameters": record["parameters"]}
        Path(f"{folder}.json").write_text(json.dumps(found), encoding="utf-8")


def machine(folder: str, count: int) -> None:
    """Worker: what one process of all that run at once gets of the machine."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    x, w = torch.randn(LENGTH, WIDE["hidden_size"]), torch.randn(WIDE["hidden_size"], WIDE["intermediate_size"])
    large, small = torch.randn(2**24), torch.zeros(1)
    target = torch.empty_like(large)
    found = {
        "flops": 2 * x.numel() * w.shape[1] / _median(lambda: x @ w, 50),
        "bandwidth": 2 * large.nbytes / _median(lambda: target.copy_(large), 10),
    }
    if ranks > 1:
        seconds = _median(lambda: dist.all_reduce(target), 5)
        found["link"] = 2 * target.nbytes * (ranks - 1) / ranks / seconds
        found["latency"] = _median(lambda: dist.all_reduce(small), 100)
        dist.barrier()
        dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(folder).write_text(json.dumps(found), encoding="utf-8")


def _median(call: Callable[[], Any], count: int) -> float:
    """Seconds; all processes at once, where there are several."""
    call()
    found = []
    for _ in range(count):
        if dist.is_initialized():
            dist.barrier()
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return statistics.median(found)


def measure_machine() -> Record:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            launch("machine", f"{folder}/{processes}", 0, processes, 1, __spec__.name)
            found[str(processes)] = json.loads(Path(folder, str(processes)).read_text(encoding="utf-8"))
    return found


def measure_layout(name: str, count: int) -> Record:
    """Seconds, bytes and memory, and the sizes of the model that was trained."""
    processes = 1 if LAYOUTS[name][1] == Shares() else 2
    with tempfile.TemporaryDirectory() as folder:
        launch("steps", f"{folder}/{name}", count, processes, 1, __spec__.name)
        found: Record = json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8"))
        sizes = asdict(Sizes.of(AutoConfig.from_pretrained(Path(folder, name, "model"))))
    return {"layout": name, "processes": processes, **found, "sizes": sizes}


def compare(results: Record) -> list[Record]:
    """Measured and estimated, layout by layout; the efficiency is that at which one process is met."""
    rows = {row["layout"]: row for row in results["rows"]}
    if "one process" not in rows:
        raise ValueError("the step of one process is what the efficiency is fitted to: measure it first")
    whole = _predicted(rows["one process"], results["machine"], 1.0)
    efficiency = min(1.0, whole.compute_s / statistics.median(rows["one process"]["seconds"]))
    found = []
    for name in LAYOUTS:
        if name not in rows:
            continue
        row, e = rows[name], _predicted(rows[name], results["machine"], efficiency)
        found.append({
            "layout": name, "efficiency": efficiency,
            "seconds": statistics.median(row["seconds"]), "fastest": min(row["seconds"]),
            "slowest": max(row["seconds"]), "sent": row["bytes_of_both"] / row["processes"],
            "held": row["held"], "step_peak": row["step_peak"],
            "estimated": {**e.to_dict(), "one_after_another_s": e.compute_s + e.network_s},
        })  # fmt: skip
    return found


def _predicted(row: Record, machines: Record, efficiency: float) -> Estimate:
    given, two = machines[str(row["processes"])], machines["2"]
    hardware = Hardware(
        name="this machine", flops=given["flops"], memory=1e15, bandwidth=given["bandwidth"], inside=two["link"],
        between=two["link"], per_machine=2, inside_latency=two["latency"], between_latency=two["latency"],
    )  # fmt: skip
    run = Run(length=LENGTH, batch=ROWS, gpus=row["processes"], efficiency=efficiency, narrow=4)
    return estimate(Sizes(**row["sizes"]), MECHANISM, run, hardware, LAYOUTS[row["layout"]][1])[0]


def table(results: Record) -> str:
    compared, machines = results["compared"], results["machine"]
    one, two = machines["1"], machines["2"]
    lines = [
        f"{ROWS} rows of {LENGTH} tokens a step (4 layers, 256 wide, window 64, fp32, AdamW), one thread a process. "
        f"Time: median (fastest to slowest) of {len(results['rows'][0]['seconds'])} steps, beside computing and "
        "network one after another, as on CPUs, and the bound in which they overlap. Memory: weights, optimiser, and "
        "the peak of a forward and backward pass, of the first process. Sent: bytes of one process in a step.",
        "",
        "| layout | step, s | estimate, s | bound, s | memory, MB | estimate | sent, MB | estimate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in compared:
        e = row["estimated"]
        fitted = " (fitted)" if row["layout"] == "one process" else ""
        lines.append(
            f"| {row['layout']} | {row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f}) | "
            f"{e['one_after_another_s']:.3f}{fitted} | {e['step_s']:.3f} | "
            f"{(row['held'] + row['step_peak']) / 1e6:.0f} | {e['memory'] / 1e6:.0f} | {row['sent'] / 1e6:.2f} | "
            f"{e['sent'] / 1e6:.2f} |"
        )
    return "\n".join([
        *lines, "",
        f"This machine by measurement: matrix products of the model's sizes {one['flops'] / 1e9:.0f} GFLOP/s alone, "
        f"{two['flops'] / 1e9:.0f} in each of two processes; copying {one['bandwidth'] / 1e9:.1f} and "
        f"{two['bandwidth'] / 1e9:.1f} GB/s; gloo {two['link'] / 1e9:.2f} GB/s, {two['latency'] * 1e6:.0f} us a "
        f"message; efficiency {compared[0]['efficiency']:.2f}.",
        "", *[f"`{command}`" for command in results["commands"]], "", describe(results["environment"]), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--part", choices=("steps", "machine"), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", metavar="LAYOUT", help="renew these (or 'machine') in an earlier result; "
                        "without names the estimates alone")  # fmt: skip
    parser.add_argument("--steps", type=int, default=8, help="of every layout that are timed")
    parser.add_argument("--update", type=Path, help="put the table between the markers of this page")
    given = parser.parse_args()
    if given.part is not None:
        {"steps": steps, "machine": machine}[given.part](given.out, given.steps)
        return
    kept = Path(given.out, "results.json")
    results: Record = json.loads(kept.read_text(encoding="utf-8")) if given.only is not None and kept.is_file() else {}
    chosen = ["machine", *LAYOUTS] if given.only is None else given.only
    if unknown := [name for name in chosen if name not in ("machine", *LAYOUTS)]:
        raise ValueError(f"there is no layout {unknown[0]!r}; there are {', '.join(LAYOUTS)}, and machine")
    if "machine" in chosen or "machine" not in results:
        results["machine"] = measure_machine()
    others = [row for row in results.get("rows", []) if row["layout"] not in chosen]
    results["rows"] = others + [measure_layout(name, given.steps) for name in LAYOUTS if name in chosen]
    results["compared"] = compare(results)
    if chosen or "environment" not in results:
        results["environment"] = environment()
    command = f"python -m hf_tfast.training.estimate_report {shlex.join(sys.argv[1:])}"
    if chosen:
        results["commands"] = [command] if given.only is None else [*results.get("commands", []), command]
    with new_folder(given.out, overwrite=given.only is not None, mark="results.json") as working:
        (working / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (working / "table.md").write_text(f"# Steps by estimate and by clock\n\n{table(results)}", encoding="utf-8")
    if given.update is not None:
        renew(given.update, "parallel_steps", table(results))


if __name__ == "__main__":
    main()
