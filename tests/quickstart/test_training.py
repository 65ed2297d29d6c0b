"""Training under a budget of time: who gets how much, in what order, and what is scored."""

import math

import pytest
import torch

from hf_tfast import Window
from hf_tfast.quickstart.training import (
    Bytes,
    byte_model,
    held_out_bits,
    learners,
    python_bytes,
    train_in_turns,
    training_table,
)


class Clock:
    """Every second reading is `seconds` later: the time of one step."""

    def __init__(self, seconds):
        self.now, self.seconds, self.readings = 0.0, seconds, 0

    def __call__(self):
        self.readings += 1
        if self.readings % 2 == 0:
            self.now += self.seconds
        return self.now


def pair(length=64, window=8):
    return learners(byte_model(length, width=64, layers=1), Window(window=window, sinks=1))


def data(rows=5, length=64, seed=0):
    return torch.randint(97, 123, (rows, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_both_get_the_budget_and_no_more():
    both = pair()
    train_in_turns(both, data(), 24.0, clock=Clock(2.5))
    assert [len(learner.curve) for learner in both] == [9, 9]  # a tenth step would end at 25
    assert all(learner.seconds == 22.5 and learner.seen == 9 * 64 for learner in both)


def test_the_first_step_is_always_taken():
    both = pair()
    train_in_turns(both, data(), 1.0, clock=Clock(30.0))
    assert [len(learner.curve) for learner in both] == [1, 1]


def test_turns_alternate(monkeypatch):
    order = []
    real = __import__("hf_tfast.quickstart.training", fromlist=["_step"])
    step = real._step
    monkeypatch.setattr(real, "_step", lambda learner, *rest: (order.append(learner.key), step(learner, *rest)))
    train_in_turns(pair(), data(), 30.0, clock=Clock(10.0))
    assert order == ["sdpa", "plan", "plan", "sdpa", "sdpa", "plan"]


def test_a_window_over_everything_learns_what_sdpa_learns():
    """Same weights, same data, same order: with all keys in the window the losses are equal, step by step."""
    both = pair(window=64)
    train_in_turns(both, data(), 7.0, clock=Clock(1.0))
    sdpa, plan = ([bits for _, _, bits in learner.curve] for learner in both)
    assert len(sdpa) == 7  # more than one pass over five sequences
    assert sdpa == pytest.approx(plan, abs=2e-3)
    assert sdpa[-1] < sdpa[0]


def test_the_order_is_drawn_from_the_seed():
    curves = []
    for seed in (0, 0, 1):
        both = pair()[:1]
        train_in_turns(both, data(), 4.0, clock=Clock(1.0), seed=seed)
        curves.append(both[0].curve)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_bits_of_an_untrained_model_are_those_of_its_logits():
    model, rows = byte_model(64, width=64, layers=1), data(rows=2)
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None, :-1].long()).logits[0].double()
        chosen = logits.log_softmax(-1)[torch.arange(63), row[1:].long()]
        total += -chosen.mean().item() / math.log(2)
    assert held_out_bits(model, rows) == pytest.approx(total / 2, abs=1e-4)


def test_the_table_holds_what_was_done():
    both = pair()
    train_in_turns(both, data(), 3.0, clock=Clock(1.0))
    rows = training_table(both, Bytes(data(), data(rows=1, seed=7)), torch.float32)
    assert [row["key"] for row in rows] == ["sdpa", "plan"]
    assert all(row["tokens_per_second"] == 64.0 and row["steps"] == 3 for row in rows)
    assert all(0 < row["held_out_bits_per_byte"] < 20 for row in rows)


def test_python_bytes_hold_out_other_files():
    found = python_bytes(length=512, sequences=40, held_out=3)
    assert found.train.shape == (40, 512)
    assert found.held_out.shape == (3, 512)
    train = bytes(found.train.flatten().tolist())
    assert all(bytes(row[100:300].tolist()) not in train for row in found.held_out)
    again = python_bytes(length=512, sequences=40, held_out=3)
    assert torch.equal(found.train, again.train)
