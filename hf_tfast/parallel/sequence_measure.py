"""What crosses the borders when a sequence is shared: bytes measured on simulated ranks, beside what the formula says.

    python -m hf_tfast.parallel.sequence_measure docs/results/sequence_parallel

One forward and one backward pass of one attention layer in fp32, batch 1, for every mechanism, number of ranks and
length. The figure is that of the rank that sends most; `moved` is what a ring that passes all keys and values around
(as exact dense attention needs) would send from it, forward and backward.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import Mask, Mechanism, Score
from ..attention.nystrom import Nystrom
from ..attention.performer import Performer
from ..attention.window import Window
from ..benchmarking.environment import describe, environment
from .sequence_attention import attend_shared
from .sequence_wire import Wire, simulate

HEADS, GROUPS, WIDTH = 8, 2, 64
RANKS, LENGTHS = (2, 4, 8), (2048, 4096, 16384)
CASES: tuple[tuple[Mechanism, bool], ...] = (
    (Window(window=256, sinks=4), True),
    (Window(window=128, sinks=4), False),
    (Performer(features=64), True),
    (Performer(features=64), False),
    (Nystrom(landmarks=64), False),
)


def measure(mechanism: Mechanism, causal: bool, ranks: int, length: int) -> dict[str, Any]:
    """Bytes that each rank sends in a forward and backward pass over `length` tokens."""
    size = length // ranks

    def one(wire: Wire) -> tuple[int, int]:
        random = torch.Generator().manual_seed(wire.rank)
        q, k, v = (
            torch.randn(1, heads, size, WIDTH, generator=random).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)
        )
        o: Tensor = attend_shared(q, k, v, mechanism, Mask(causal=causal), Score(), wire)
        forward = wire.sent
        o.sum().backward()
        return forward, wire.sent - forward

    sent = simulate(ranks, one)
    token = 2 * GROUPS * WIDTH * 4
    return {
        "mechanism": mechanism.to_dict(),
        "causal": causal,
        "ranks": ranks,
        "length": length,
        "forward_bytes": [forward for forward, _ in sent],
        "backward_bytes": [backward for _, backward in sent],
        "most": max(sum(both) for both in sent),
        "moved": 2 * token * size * (ranks - 1),
    }


def table(results: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The most that a rank sends, in KiB, by length; and what passing all keys and values around would send."""
    lines = [
        "# Bytes that a shared sequence sends",
        "",
        f"One attention layer, {HEADS} query heads on {GROUPS} key heads of width {WIDTH}, fp32, batch 1: KiB that",
        "the busiest rank sends in one forward and backward pass. Last columns: what a ring that passes all keys and",
        "values around sends from every rank.",
        "",
        "| mechanism | ranks | " + " | ".join(f"L = {n}" for n in LENGTHS) + " | "
        + " | ".join(f"ring, L = {n}" for n in LENGTHS) + " |",
        "|---|---:|" + "---:|" * (2 * len(LENGTHS)),
    ]  # fmt: skip
    rows: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for r in results:
        fields = ", ".join(f"{k}={v}" for k, v in r["mechanism"].items() if k != "mechanism")
        name = f"{r['mechanism']['mechanism']} ({fields}), {'causal' if r['causal'] else 'bidirectional'}"
        rows.setdefault((name, r["ranks"]), {})[r["length"]] = r
    for (name, ranks), by_length in rows.items():
        sent = [f"{by_length[n]['most'] / 1024:.0f}" for n in LENGTHS]
        ring = [f"{by_length[n]['moved'] / 1024:.0f}" for n in LENGTHS]
        lines.append(f"| {name} | {ranks} | " + " | ".join([*sent, *ring]) + " |")
    command = "python -m hf_tfast.parallel.sequence_measure docs/results/sequence_parallel"
    made = f"Made by `{command}`; ranks are threads, bytes are counted where they are handed over."
    return "\n".join([*lines, "", made, "", describe(machine), ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where results.json and table.md go")
    folder = parser.parse_args(arguments).folder
    machine = environment()
    results = [
        measure(mechanism, causal, ranks, length)
        for mechanism, causal in CASES
        for ranks in RANKS
        for length in LENGTHS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"environment": machine, "results": results}, indent=1) + "\n")
    (folder / "table.md").write_text(table(results, machine))


if __name__ == "__main__":
    main()
