"""What seldom and late averages cost in loss, and whether two cores are better used as threads or as processes.

    python -m hf_tfast.training.scaling_report --out docs/results/parallel

trains small models with two processes, each way of averaging from the same weights on the same rows, then times one
process with two threads against two processes with one thread each, by turns. It leaves results.json and table.md.
"""

import argparse
import asyncio
import email
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarking.environment import describe, environment
from ..benchmarking.folder import new_folder

Record = dict[str, Any]
WAYS: dict[str, tuple[Record, int]] = {  # name: (options, staleness bound in steps)
    "every step (synchronous)": ({}, 0),
    "every 4 steps": ({"average_every": 4}, 4),
    "every 16 steps": ({"average_every": 16}, 16),
    "every 4 steps, 1 late": ({"average_every": 4, "average_delay": 1}, 5),
    "every 16 steps, 1 late": ({"average_every": 16, "average_delay": 1}, 17),
    "every 16 steps, 8 late": ({"average_every": 16, "average_delay": 8}, 24),
}
SMALL = {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 176}
WIDE = {"hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 704}
# few, so that launches are short: 0.9 MB of sources of the running Python
TEXTS = {"text": [f"{Path(module.__file__ or '').parent}/*.py" for module in (asyncio, email)], "tokenizer": "bytes"}
ROWS = 2  # of a timed step, over all processes


def train(out: str, model: Record, data: Record, options: Record, callbacks: Sequence[Any] = ()) -> Record:
    """The record of one training; in every process that torchrun has started."""
    from .arguments import DataArguments, ModelArguments, PretrainingArguments
    from .run import pretrain

    given: Record = {"use_cpu": True, "disable_tqdm": True, "plot": False, "report_to": "none", "save_strategy": "no"}
    attention = '{"mechanism": "window", "window": 64}'
    return pretrain(
        DataArguments(**data),
        ModelArguments(attention=attention, **model),
        PretrainingArguments(output_dir=out, **given, **options),
        callbacks=callbacks,
    )[0]


def averages(folder: str, steps: int) -> None:
    """Worker: one training for every way, saved in folder."""
    for number, (options, _) in enumerate(WAYS.values()):
        data = {**TEXTS, "length": 256, "validation_sequences": 64}
        more = {"max_steps": steps, "per_device_train_batch_size": 4, "eval_steps": steps, "logging_steps": 1}
        train(f"{folder}/{number}", SMALL, data, {**more, **options})


def timed(folder: str, steps: int) -> None:
    """Worker: a few steps, timed one by one by the trainer."""
    data = {**TEXTS, "length": 2048, "validation_sequences": 2}
    rows = ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    more = {"max_steps": steps, "per_device_train_batch_size": rows, "eval_strategy": "no", "logging_steps": 1}
    train(folder, WIDE, data, more)


def launch(part: str, folder: str, steps: int, processes: int, threads: int, module: str = "") -> None:
    """This file's workers, or those of another module that takes the same options."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = command if processes > 1 else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    arguments = ["-m", module or __spec__.name, "--part", part, "--out", folder, "--steps", str(steps)]
    subprocess.run([*start, *arguments], env=env, check=True, stdout=subprocess.DEVNULL)


def measure_averages(steps: int) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        launch("averages", folder, steps, 2, 1)
        found = []
        for number, (name, (options, stale)) in enumerate(WAYS.items()):
            record = json.loads(Path(folder, str(number), "metrics.json").read_text(encoding="utf-8"))
            drifts = [h["drift"] for h in record["history"] if "drift" in h]
            found.append({
                "way": name, "options": options, "staleness_bound": stale, "steps": record["steps"],
                "loss": record["final"]["eval_loss"], "drift_mean": statistics.mean(drifts) if drifts else 0.0,
                "drift_largest": max(drifts, default=0.0),
                "bytes_a_step": 4 * record["parameters"] / options.get("average_every", 1),
            })  # fmt: skip
    return found


def measure_shares(steps: int, rounds: int) -> list[Record]:
    times: dict[tuple[int, int], list[float]] = {(1, 2): [], (2, 1): []}
    for _ in range(rounds):
        for (processes, threads), found in times.items():
            with tempfile.TemporaryDirectory() as folder:
                launch("timed", f"{folder}/out", steps, processes, threads)
                record = json.loads(Path(folder, "out", "metrics.json").read_text(encoding="utf-8"))
            seconds = [h["seconds"] for h in record["history"] if "grad_norm" in h]
            found += [after - before for before, after in zip(seconds[2:], seconds[3:], strict=False)]
    return [
        {"processes": p, "threads": t, "step_seconds": statistics.median(found), "fastest": min(found),
         "slowest": max(found), "tokens_per_second": ROWS * 2048 / statistics.median(found), "steps": len(found)}
        for (p, t), found in times.items()
    ]  # fmt: skip


def table(results: Record) -> str:
    lines = ["# Averaging weights seldom and late; threads and processes", ""]
    lines += _averages(results["averages"]) if "averages" in results else []
    lines += _shares(results["shares"]) if "shares" in results else []
    lines += [f"`{command}`" for command in results["commands"]]
    return "\n".join([*lines, "", describe(results["environment"]), ""])


def _averages(found: list[Record]) -> list[str]:
    lines = [
        f"Two processes, window attention, {found[0]['steps']} steps of 8 rows of 256 bytes, the same "
        "rows and first weights for all. Loss: of held-out rows after the last step. Drift: distance of a process's "
        "weights from their mean before they are averaged, relative to the mean's norm.",
        "",
        "| weights are averaged | staleness bound, steps | loss | against synchronous | drift, mean | largest | "
        "kB a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = found[0]["loss"]
    for r in found:
        lines.append(
            f"| {r['way']} | {r['staleness_bound']} | {r['loss']:.4f} | {r['loss'] - first:+.4f} | "
            f"{r['drift_mean']:.4f} | {r['drift_largest']:.4f} | {r['bytes_a_step'] / 1000:.0f} |"
        )
    return [*lines, ""]


def _shares(found: list[Record]) -> list[str]:
    lines = [
        f"One step of {ROWS} rows of 2048 tokens (4 layers, 256 wide, fp32), forward, backward and update, by turns:",
        "",
        "| processes x threads | median s | fastest | slowest | tokens/s | steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        lines.append(
            f"| {r['processes']} x {r['threads']} | {r['step_seconds']:.3f} | {r['fastest']:.3f} | "
            f"{r['slowest']:.3f} | {r['tokens_per_second']:.0f} | {r['steps']} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--part", choices=("averages", "timed"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("averages", "shares"), help="renew this half of an earlier result")
    parser.add_argument("--steps", type=int, default=200, help="of every training that is compared")
    parser.add_argument("--timed_steps", type=int, default=10, help="of every launch that is timed")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each that is timed")
    given = parser.parse_args()
    if given.part is not None:
        {"averages": averages, "timed": timed}[given.part](given.out, given.steps)
        return
    kept = Path(given.out, "results.json")
    results: Record = json.loads(kept.read_text(encoding="utf-8")) if given.only and kept.is_file() else {}
    if given.only != "shares":
        results["averages"] = measure_averages(given.steps)
    if given.only != "averages":
        results["shares"] = measure_shares(given.timed_steps, given.rounds)
    results["environment"] = environment()
    name = "python -m hf_tfast.training.scaling_report"
    command = " ".join([name, *sys.argv[1:]])
    results["commands"] = [*results.get("commands", []), command] if given.only else [command]
    with new_folder(given.out, overwrite=given.only is not None, mark="results.json") as working:
        (working / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (working / "table.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
