"""The same wall-clock budget of training, twice: a small byte-level causal model with `sdpa` and with a window plan.

Both start from the same random weights and see the same sequences in the same order; they take turns in slices of a
few seconds, so that whatever else the machine does hits both. What differs is how many sequences each gets through.
Then both are scored on the same held-out files, each with its own attention.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..attention import Mechanism
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from ..training.sources import python_files
from .progress import Steps

LENGTH = 8192  # bytes of a sequence
SLICE = 10.0  # seconds of a turn
RATE, WARM_UP = 1e-3, 10  # AdamW; steps over which the rate rises
HELD_OUT = 4  # sequences


@dataclass(frozen=True)
class Bytes:
    """Sequences of bytes, [n length] uint8 each."""

    train: Tensor
    held_out: Tensor


@dataclass
class Learner:
    """A model in training and what it has been through. `curve`: (seconds, bytes seen, bits per byte of that step)."""

    key: str
    label: str
    model: PreTrainedModel
    optimiser: torch.optim.Optimizer
    seconds: float = 0.0
    last: float = 0.0  # seconds of the latest step
    curve: list[tuple[float, int, float]] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return self.curve[-1][1] if self.curve else 0


def python_bytes(length: int = LENGTH, sequences: int = 1024, held_out: int = HELD_OUT) -> Bytes:
    """Sources and documentation of the running Python; one file in sixteen, by its name's hash, is held out."""
    texts = python_files()
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts = {True: bytearray(), False: bytearray()}
    wanted = {True: held_out * length, False: sequences * length}
    for name in order:
        aside = hashlib.sha256(b"held out" + name.encode()).digest()[0] < 16
        if len(parts[aside]) < wanted[aside]:
            parts[aside] += texts[name].read_bytes() + b"\n"
    rows = {aside: _rows(parts[aside][: wanted[aside]], length) for aside in parts}
    if not len(rows[True]) or not len(rows[False]):
        raise ValueError("this Python has too few sources to train on; leave training out with --seconds 0")
    return Bytes(train=rows[False], held_out=rows[True])


def _rows(data: bytearray, length: int) -> Tensor:
    whole = len(data) // length * length
    return torch.frombuffer(bytearray(data[:whole]), dtype=torch.uint8).view(-1, length) if whole else torch.empty(0)


def byte_model(length: int = LENGTH, width: int = 256, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama over bytes with heads of 64."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def learners(model: PreTrainedModel, mechanism: Mechanism) -> list[Learner]:
    """The model with `sdpa` and an equal copy with the mechanism, each with its own AdamW."""
    fast = apply_plan(deepcopy(model), FastPlan(attention=mechanism))
    pairs = (("sdpa", "sdpa", model), ("plan", f"plan ({mechanism!r})", fast))
    return [Learner(key, label, m, torch.optim.AdamW(m.parameters(), lr=RATE)) for key, label, m in pairs]


def train_in_turns(
    contestants: Sequence[Learner],
    data: Tensor,
    seconds: float,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    steps: Steps | None = None,
) -> None:
    """Train each for `seconds`, in turns of SLICE seconds and in alternating order.

    A step is begun when it would end within the budget if it takes as long as the last; the first always is.
    data   [n length] uint8; every pass over it has its own order, drawn from `seed` and equal for all.
    dtype  what torch.autocast computes in; weights stay in float32.
    """
    turns = max(math.ceil(seconds / SLICE), 1)
    for turn in range(turns):
        until = seconds * (turn + 1) / turns
        for learner in contestants if turn % 2 == 0 else reversed(contestants):
            while learner.seconds < until and learner.seconds + learner.last <= seconds:
                _step(learner, data, dtype, seed, clock)
                if steps is not None:
                    note = ", ".join(f"{c.key} {c.seen:,} bytes" for c in contestants)
                    steps.to(sum(c.seconds for c in contestants), note)


def _step(learner: Learner, data: Tensor, dtype: torch.dtype, seed: int, clock: Callable[[], float]) -> None:
    number = len(learner.curve)
    row = _order(len(data), number // len(data), seed)[number % len(data)]
    start = clock()
    learner.model.train()
    for group in learner.optimiser.param_groups:
        group["lr"] = RATE * min((number + 1) / WARM_UP, 1.0)
    loss = _bits(learner.model, data[row][None], dtype)
    learner.optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
    learner.optimiser.step()
    bits = loss.item()  # waits for an accelerator
    took = clock() - start
    learner.seconds += took
    learner.last = took
    learner.curve.append((learner.seconds, learner.seen + data.shape[1], bits))


def _order(count: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _bits(model: PreTrainedModel, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean bits per byte that the model needs for all but the first byte of rows [b i] uint8."""
    ids = rows.long().to(model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def held_out_bits(model: PreTrainedModel, rows: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Bits per byte over held-out rows [n i], each by itself."""
    model.eval()
    return sum(_bits(model, row[None], dtype).item() for row in rows) / len(rows)


def training_table(contestants: Sequence[Learner], data: Bytes, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        {
            "key": learner.key,
            "label": learner.label,
            "seconds": learner.seconds,
            "tokens": learner.seen,
            "tokens_per_second": learner.seen / learner.seconds,
            "steps": len(learner.curve),
            "held_out_bits_per_byte": held_out_bits(learner.model, data.held_out, dtype),
            "curve": learner.curve,
        }
        for learner in contestants
    ]
