"""Timing: turns, budget, forecasts, and that nothing is left out without a word."""

import json

import pytest

from hf_tfast import Dense, Window
from hf_tfast.benchmarking import speed
from hf_tfast.benchmarking.memory import Peak
from hf_tfast.benchmarking.speed import Forecast, Timing, describe, measure
from hf_tfast.benchmarking.workload import SDPA, Case, Competitor

TINY = {"heads": 2, "kv_heads": 1, "width": 8}
CASES = [Case(length=n, **TINY) for n in (40, 20)]
WHO = [SDPA, Competitor("Window(window=4)", Window(window=4)), Competitor("Dense", Dense())]


@pytest.fixture
def clock(monkeypatch):
    """Replaces the measurement: a call takes as many seconds as `clock` says, and is noted."""

    class Clock:
        def __init__(self):
            self.calls, self.cost = [], lambda case, label: 0.001

    state = Clock()

    def workload(case, who, inputs):
        return lambda: (case, who.label)

    def sample(call, repeats, device):
        case, label = call()
        state.calls.append((case.length, label, repeats))
        return state.cost(case, label)

    monkeypatch.setattr(speed, "workload", workload)
    monkeypatch.setattr(speed, "_sample", sample)
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: (call(), Peak(100, "kernel"))[1])
    return state


def test_a_real_run():
    timings = list(measure(CASES, WHO, rounds=3, seconds=5.0))
    assert [t.case.length for t in timings] == [20, 20, 20, 40, 40, 40]
    for t in timings:
        assert 1 <= len(t.samples) <= 3
        assert min(t.samples) > 0
        assert t.quartiles[0] <= t.median <= t.quartiles[1]
        baseline = next(b for b in timings if b.case == t.case and b.label == "SDPA")
        assert t.speedup == pytest.approx(baseline.median / t.median)
        line = json.loads(json.dumps(t.record()))
        assert line["seconds"] == t.median
        assert line["mechanism"] is None or line["mechanism"]["mechanism"] in ("window", "dense")
        assert line["peak_bytes"] >= 0


def test_competitors_take_turns(clock):
    list(measure(CASES[:1], WHO, rounds=3, seconds=5.0))
    names = [label for _, label, repeats in clock.calls if repeats > 1]
    first, second, third = (who.label for who in WHO)
    assert names == [first, second, third, second, third, first, third, first, second]


def test_short_calls_are_repeated_and_long_ones_are_not(clock):
    clock.cost = lambda case, label: 0.0001 if label == "SDPA" else 0.5
    sdpa, window, _ = measure(CASES[:1], WHO, rounds=2, seconds=5.0)
    assert sdpa.repeats * 0.0001 == pytest.approx(speed.SAMPLE)
    assert window.repeats == 1
    assert window.speedup == pytest.approx(0.0002)


def test_the_budget_limits_samples(clock):
    clock.cost = lambda case, label: 2.0
    for timing in measure(CASES[:1], WHO, rounds=7, seconds=7.0):
        assert len(timing.samples) == 3  # 3 x 2 s fit into 7 s; the first, being long, was no warm-up
    assert len(clock.calls) == 9


def test_what_would_take_too_long_is_skipped_and_says_so(clock):
    clock.cost = lambda case, label: (case.length / 4096) ** 2 if label == "SDPA" else case.length / 4096
    lengths = (1024, 4096, 16384, 65536)
    timings = list(measure([Case(length=n, **TINY) for n in lengths], WHO[:2], rounds=1, seconds=20.0))
    skipped = {(t.label, t.case.length): t.skipped for t in timings if t.skipped}
    assert list(skipped) == [("SDPA", 65536)]
    assert skipped["SDPA", 65536] == "one call would take about 256 s, over the budget of 20 s"
    last = timings[-1]
    assert last.skipped is None
    assert last.speedup is None  # nothing to compare with, and no invented figure
    assert "skipped" in timings[-2].record()


def test_a_long_first_length_is_approached(clock):
    clock.cost = lambda case, label: (case.length / 1024) ** 2
    timings = list(measure([Case(length=65536, **TINY)], WHO[:1], seconds=30.0))
    assert [length for length, _, _ in clock.calls][-1] == 4096  # at 16384 it would be 256 s
    assert timings[0].skipped == "one call would take about 4096 s, over the budget of 30 s"


def test_memory_that_would_not_fit_is_not_tried(clock, monkeypatch):
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: (call(), Peak(2**20, "kernel"))[1])
    monkeypatch.setattr(speed, "available_memory", lambda device: 2**22)
    small, large = measure([Case(length=n, **TINY) for n in (128, 256)], WHO[:1], rounds=1)
    assert small.skipped is None
    assert large.skipped.startswith("one call might take")


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory: you"])
def test_running_out_of_memory_is_recorded(monkeypatch, words):
    def fails(case, who, inputs):
        raise RuntimeError(words)

    monkeypatch.setattr(speed, "workload", fails)
    (timing,) = measure(CASES[:1], WHO[:1])
    assert timing.skipped == f"out of memory: {words}"


def test_other_errors_are_not_swallowed(monkeypatch):
    def fails(case, who, inputs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(speed, "workload", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(measure(CASES[:1], WHO[:1]))


def test_forecast():
    forecast = Forecast()
    assert forecast.at(100) is None
    forecast.add(100, 1.0, 10)
    assert forecast.at(200) == (4.0, 40.0)  # nothing known about growth: quadratic
    forecast.add(200, 2.0, 20)
    assert forecast.at(800) == pytest.approx((8.0, 320.0))  # linear in time; memory stays careful
    forecast.add(400, 32.0, 20)
    assert forecast.at(800)[0] == pytest.approx(128.0)  # never steeper than quadratic
    forecast.add(400, 1.0, 20)
    assert forecast.at(800)[0] == pytest.approx(2.0)  # never flatter than linear


def test_few_samples_have_their_extremes_as_quartiles():
    timing = Timing(label="x", mechanism=None, case=CASES[0], samples=(3.0, 1.0))
    assert timing.quartiles == (1.0, 3.0)
    assert timing.median == 2.0


@pytest.mark.parametrize(("rounds", "seconds"), [(0, 1.0), (1, 0.0)])
def test_bad_budgets(rounds, seconds):
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        list(measure(CASES, WHO, rounds=rounds, seconds=seconds))


def test_a_case_in_words():
    assert (
        describe(Case(length=64, kv_heads=2, left_padding=3)) == "L=64 fp32 forward causal kv_heads=2 left_padding=3"
    )
