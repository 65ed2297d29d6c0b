"""The arithmetic floor: how long a pattern's products alone take at the rate that this machine's matmul reaches.

pairs   that the pattern reads, by its own predicate; longer inputs than QUERIES are counted on as many evenly spaced
        queries. Patterns that look at the content first, and mechanisms that are no pattern of pairs, have no floor.
work    2 floating-point operations a pair and channel. Forward: scores (d) and outputs (e). Backward: scores once more
        (d), the gradients of weights (e), values (e), queries (d) and keys (d). Softmax and memory cost nothing.
peak    the best of CALLS products of square matrices of SIDE in the same dtype, on the same device and threads.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch

from ..attention import Mask, Mechanism, mechanism_from_dict
from .recall import evenly, pairs
from .speed import Timing
from .workload import DTYPES, Case

Record = dict[str, Any]
QUERIES, SIDE, CALLS = 4096, 2048, 8
FIGURES = ("quartiles", "samples", "repeats", "speedup", "peak_bytes", "peak_method", "p99")  # not of a floor


def operations(mechanism: Mechanism, case: Case) -> int | None:
    """Floating-point operations of the case's matrix products; None where a pattern depends on more than positions."""
    if type(mechanism).choose is not Mechanism.choose or type(mechanism).allowed is Mechanism.allowed:
        return None
    length = case.length - case.left_padding
    q = torch.empty(1, 1, length, 1)
    found = 0
    rows = evenly(length, QUERIES)
    for some in rows.split(max(1, 2**24 // length)):
        found += int(pairs(mechanism, q, q, Mask(causal=case.causal), some, None)[0].sum())
    read = found * length / len(rows) * case.heads * case.batch
    return round(2 * read * case.width * (7 if case.passes == "both" else 2))


def peak(dtype: str, device: str) -> float:
    """Operations per second of the fastest of some large matrix products."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(DTYPES[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(CALLS):
        began = time.perf_counter()
        a @ b
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


def floors(timings: Iterable[Timing]) -> list[Record]:
    """A record for every timing that has a floor and figures: operations, peak, and seconds of the floor."""
    records: list[Record] = []
    peaks: dict[tuple[str, str], float] = {}
    for timing in timings:
        case = timing.case
        if timing.mechanism is None or timing.skipped is not None or case.level != "kernel":
            continue
        work = operations(mechanism_from_dict(timing.mechanism), case)
        if work is None:
            continue
        where = case.dtype, case.device
        if where not in peaks:
            peaks[where] = peak(*where)
        speed = peaks[where]
        line = {key: value for key, value in timing.record().items() if key not in FIGURES}
        records.append({**line, "kind": "floor", "operations": work, "peak": speed, "seconds": work / speed})
    return records
