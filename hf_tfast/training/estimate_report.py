"""What `tfast estimate` says of steps on this machine, beside what they took: time, memory and bytes, by layout.

    python -m hf_tfast.training.estimate_report --out docs/results/parallel_steps --update docs/scale.md

measures what the formulas need of this machine (products, memory and gloo at the sizes of a layer; alone and with two
processes at once), then trains two small models for a few steps in one process and by every layout of two, one thread
each. Nothing is fitted to a step. `--only` renews some layouts.

Memory is what the C library has handed out at the fullest moment of two steps, in the fullest process: weights,
moments, gradients, what autograd keeps. The resident set holds its unused holes, too, and is given beside it. Bytes
are those that the kernel counts on the loopback device, halved: what one of two processes sends, with TCP's own.
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, TrainerCallback

from ..attention import Mask, Score
from ..attention.window import Window
from ..benchmarking.environment import describe, environment
from ..benchmarking.folder import new_folder
from ..benchmarking.pages import renew
from ..parallel.estimate import Estimate, Run, Shares, estimate
from ..parallel.estimate_hardware import Hardware
from ..parallel.estimate_model import Sizes
from ..parallel.estimate_time import operations
from .allocated import Sampler
from .scaling_report import ROWS, TEXTS, WIDE, launch, train
from .states import held_bytes

Record = dict[str, Any]
WARM = 2  # steps before the first whose time counts; their memory is watched, which takes time
MANY = 32  # states that are read and written in turn, so that a cache does not hold them all
MECHANISM = Window(window=64)  # of scaling_report's trainings
SHAPES: dict[str, tuple[Record, int]] = {  # model and tokens of a row
    "4 layers of 256": (WIDE, 2048),
    "3 layers of 384": ({"hidden_size": 384, "layers": 3, "heads": 6, "intermediate_size": 512}, 1024),
}
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
    """Seconds of every step (from its end to the end of the one before), bytes over the loopback, and memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.counted: list[int] = []
        self.weights = self.held = self.peak = 0
        self.sampler: Sampler | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is there, and cut; wrappers, gradients and the optimiser's states are still to come."""
        self.weights = held_bytes(kwargs["model"], torch.optim.SGD(kwargs["model"].parameters()))
        self.sampler = Sampler()
        self.sampler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM and self.sampler is not None:
            self.peak = self.sampler.stop()
        self.ends.append(time.perf_counter())
        self.counted.append(loopback_bytes())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.held = held_bytes(kwargs["model"], getattr(optimizer, "optimizer", optimizer))

    def found(self) -> Record:
        seconds = [b - a for a, b in zip(self.ends[WARM - 1 :], self.ends[WARM:], strict=False)]
        counted = (self.counted[-1] - self.counted[WARM - 1]) / len(seconds)
        return {"seconds": seconds, "bytes_of_both": counted, "held": self.held, "memory": self.weights + self.peak}


def loopback_bytes() -> int:
    """That the loopback device has carried since the machine began. OSError where the kernel does not tell."""
    if not _COUNTERS.is_file():
        raise OSError(f"bytes sent are counted by Linux alone, in {_COUNTERS}, which is not there")
    for line in _COUNTERS.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    raise OSError(f"{_COUNTERS} has no loopback device")


def steps(folder: str, count: int) -> None:
    """Worker: the layout that the folder is named after, for every shape."""
    options, _ = LAYOUTS[Path(folder).name]
    rank = os.environ.get("RANK", "0")
    for number, (model, length) in enumerate(SHAPES.values()):
        data = {**TEXTS, "length": length, "validation_sequences": 2}
        more = {"max_steps": WARM + count, "per_device_train_batch_size": 1, "eval_strategy": "no", "logging_steps": 1}
        watch = Watch()
        record = train(f"{folder}/{number}", model, data, {**more, **options}, [watch])
        found = watch.found()
        if record:  # of the first process
            found |= {"step_peak": record["step_peak_bytes"], "parameters": record["parameters"]}
        Path(folder, f"{number}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def machine(folder: str, count: int) -> None:
    """Worker: what one process of all that run at once gets of the machine, at the sizes of every shape."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for name, (model, length) in SHAPES.items():
        sizes = _sizes(model)
        state = torch.randn(length, sizes.hidden)
        mine = {
            "flops": _products(sizes, length, 1),
            "flops_cut": _products(sizes, length, 2),
            "bandwidth": _bandwidth(state),
        }
        if ranks > 1:
            seconds = _seconds(lambda a=state: dist.all_reduce(a), 20)  # type: ignore[misc]
            mine["link"] = 2 * state.nbytes * (ranks - 1) / ranks / seconds
            small = torch.zeros(1)
            mine["tensor_latency"] = _tensor_latency()
            mine["latency"] = _seconds(lambda a=small: dist.all_reduce(a), 100)  # type: ignore[misc]
        found[name] = mine
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(folder).write_text(json.dumps(found), encoding="utf-8")


def _bandwidth(state: torch.Tensor) -> float:
    """Bytes a second, read and written, of products of states that no cache holds."""
    many = [torch.randn_like(state) for _ in range(MANY)]
    others = [torch.empty_like(state) for _ in range(MANY)]

    def multiply() -> None:
        for x, y, z in zip(many, many[::-1], others, strict=True):
            torch.mul(x, y, out=z)

    return 3 * MANY * state.nbytes / _seconds(multiply, 20, min)


def _tensor_latency() -> float:
    """Seconds of a matrix under tensor parallelism whose numbers are next to none: its sum over the processes, and
    what DTensor does around it, forward and backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: Any = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    pair = parallelize_module(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)), mesh, plan)
    x = torch.randn(2, 64, requires_grad=True)
    return _seconds(lambda: pair(x).sum().backward(), 50) / 2


def _sizes(model: Record) -> Sizes:
    heads = model["heads"]
    return Sizes(layers=model["layers"], hidden=model["hidden_size"], heads=heads, groups=heads,
                 width=model["hidden_size"] // heads, inner=model["intermediate_size"], vocabulary=260)  # fmt: skip


def _products(sizes: Sizes, length: int, cut: int) -> float:
    """Operations a second of one layer's products and of its attention, forward and backward, in `cut` parts."""
    wide, inner, hidden = sizes.heads * sizes.width // cut, sizes.inner // cut, sizes.hidden
    shapes = [*[(hidden, wide)] * 3, (wide, hidden), *[(hidden, inner)] * 2, (inner, hidden)]
    weights = [torch.randn(out, into) for into, out in shapes]
    reads = [torch.randn(length, into) for into, _ in shapes]
    grads = [torch.randn(length, out) for _, out in shapes]
    q, k, v = (torch.randn(1, sizes.heads // cut, length, sizes.width, requires_grad=True) for _ in range(3))

    def layer() -> None:
        o = MECHANISM.fast(q, k, v, Mask(causal=True), Score())
        torch.autograd.grad(o, (q, k, v), o.detach())
        for x, w, g in zip(reads, weights, grads, strict=True):
            _ = x @ w.T, g @ w, g.T @ x

    done = operations(sizes, MECHANISM, length, checkpointing=False)[0] * length / cut
    return done / _seconds(layer, 20, min)


def _seconds(call: Callable[[], Any], count: int, of: Callable[[list[float]], float] = statistics.median) -> float:
    """Of `count` calls; all processes at once, where there are several. What a machine can do is its fastest call."""
    call()
    found = []
    for _ in range(count):
        if dist.is_initialized():
            dist.barrier()
        before = time.perf_counter()
        call()
        found.append(time.perf_counter() - before)
    return of(found)


def measure_machine() -> Record:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            launch("machine", f"{folder}/{processes}", 0, processes, 1, __spec__.name)
            found[str(processes)] = json.loads(Path(folder, str(processes)).read_text(encoding="utf-8"))
    return found


def measure_layout(name: str, count: int) -> list[Record]:
    """Of every shape: seconds, bytes and memory, and the sizes of the model that was trained."""
    processes = 1 if LAYOUTS[name][1] == Shares() else 2
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        launch("steps", f"{folder}/{name}", count, processes, 1, __spec__.name)
        for number, (shape, (_, length)) in enumerate(SHAPES.items()):
            ranks = [json.loads(Path(folder, name, f"{number}-{rank}.json").read_text(encoding="utf-8"))
                     for rank in range(processes)]  # fmt: skip
            sizes = asdict(Sizes.of(AutoConfig.from_pretrained(Path(folder, name, str(number), "model"))))
            memory = max(rank["memory"] for rank in ranks)
            rows.append({"shape": shape, "length": length, "layout": name, "processes": processes, **ranks[0],
                         "memory": memory, "sizes": sizes})  # fmt: skip
    return rows


def compare(results: Record) -> list[Record]:
    """Measured and estimated, shape by shape and layout by layout."""
    rows = {(row["shape"], row["layout"]): row for row in results["rows"]}
    found = []
    for shape in SHAPES:
        for name in LAYOUTS:
            if (shape, name) not in rows:
                continue
            row = rows[shape, name]
            e = _predicted(row, results["machine"])
            found.append({
                "shape": shape, "layout": name,
                "seconds": statistics.median(row["seconds"]), "fastest": min(row["seconds"]),
                "slowest": max(row["seconds"]), "sent": row["bytes_of_both"] / row["processes"],
                "memory": row["memory"], "resident": row["held"] + row["step_peak"],
                "estimated": {**e.to_dict(), "one_after_another_s": e.compute_s + e.bandwidth_s + e.network_s},
            })  # fmt: skip
    return found


def _predicted(row: Record, machines: Record) -> Estimate:
    shares = LAYOUTS[row["layout"]][1]
    given, two = machines[str(row["processes"])][row["shape"]], machines["2"][row["shape"]]
    latency = two["tensor_latency" if shares.tensor > 1 else "latency"]
    hardware = Hardware(
        name="this machine", flops=given["flops_cut" if shares.tensor > 1 else "flops"], memory=1e15,
        bandwidth=given["bandwidth"], inside=two["link"], between=two["link"], per_machine=2,
        inside_latency=latency, between_latency=latency, fused_norm=False, reduces_whole=True,
    )  # fmt: skip
    run = Run(length=row["length"], batch=ROWS, gpus=row["processes"], efficiency=1.0, narrow=4)
    return estimate(Sizes(**row["sizes"]), MECHANISM, run, hardware, shares)[0]


def table(results: Record) -> str:
    machines = results["machine"]
    lines = [
        f"{ROWS} rows a step (window 64, fp32, AdamW), one thread a process. Time: median (fastest to slowest) of "
        f"{len(results['rows'][0]['seconds'])} steps, beside the estimate: products, what lies between them and "
        "network one after another, as on CPUs. Memory of the fullest process: what is handed out at its fullest "
        "moment; resident: with the holes in its heap, of the first process. Sent: bytes of one process in a step.",
        "",
        "| shape, tokens of a row | layout | step, s | estimate, s | measured / estimate | memory, MB | estimate | "
        "error | resident | sent, MB | estimate |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["compared"]:
        e = row["estimated"]
        time_s, memory = e["one_after_another_s"], e["memory"]
        lines.append(
            f"| {row['shape']}, {SHAPES[row['shape']][1]} | {row['layout']} | {row['seconds']:.3f} "
            f"({row['fastest']:.3f} to {row['slowest']:.3f}) | {time_s:.3f} | {row['seconds'] / time_s:.2f} | "
            f"{row['memory'] / 1e6:.0f} | {memory / 1e6:.0f} | {memory / row['memory'] - 1:+.0%} | "
            f"{row['resident'] / 1e6:.0f} | {row['sent'] / 1e6:.2f} | {e['sent'] / 1e6:.2f} |"
        )
    told = []
    for shape in SHAPES:
        one, two = machines["1"][shape], machines["2"][shape]
        told.append(
            f"{shape}: products {one['flops'] / 1e9:.0f} GFLOP/s alone, {two['flops'] / 1e9:.0f} in each of two "
            f"processes, {two['flops_cut'] / 1e9:.0f} cut in half; between them {one['bandwidth'] / 1e9:.1f} and "
            f"{two['bandwidth'] / 1e9:.1f} GB/s; gloo {two['link'] / 1e9:.2f} GB/s, {two['latency'] * 1e6:.0f} us a "
            f"message, {two['tensor_latency'] * 1e6:.0f} us around a cut matrix."
        )
    return "\n".join([
        *lines, "", "This machine by measurement, at the sizes of a layer. " + " ".join(told),
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
    results["rows"] = others + [row for name in LAYOUTS if name in chosen for row in measure_layout(name, given.steps)]
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
