"""Times competitors against each other: in one process, in turns, as medians with quartiles, under a time budget.

Turns      Every round runs each competitor once, starting with another one each time, so that a machine that slows
           down or warms up does so for all of them.
Repeats    A sample repeats a short call until it lasts `SAMPLE` seconds; the time is that of one call.
Warm-up    The first call measures peak memory and is not timed, unless it takes over a second: then it is the first
           sample, since nothing that needs warming up takes that long.
Budget     `seconds` for one competitor in one case. Before a case is run, its time and memory are forecast from
           shorter lengths; what would not fit is skipped, and the record says so. Wide gaps are crossed
           in steps, one call each, for the same reason.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median, quantiles
from typing import Any

import torch

from .memory import Peak, available_memory, peak_memory
from .workload import CannotRun, Case, Competitor, Inputs, make_inputs, workload

SAMPLE = 0.03  # seconds: far above the clock's resolution and above a scheduler's time slice
NO_WARM_UP = 1.0  # seconds
Report = Callable[[str], None]
APPROACH = (256, 1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One competitor in one case. `skipped` says why there are no figures, else it is None."""

    label: str
    mechanism: dict[str, Any] | None
    case: Case
    series: str = ""  # as in Competitor
    samples: tuple[float, ...] = ()  # seconds of one call, in the order they were taken
    repeats: int = 0
    peak: Peak | None = None
    speedup: float | None = None  # median of SDPA in the same case over this median; above 1 is faster
    skipped: str | None = None

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; with fewer than three samples the extremes."""
        if len(self.samples) < 3:
            return min(self.samples), max(self.samples)
        first, _, third = quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def record(self) -> dict[str, Any]:
        """The JSON line."""
        line: dict[str, Any] = {
            "kind": "timing",
            "label": self.label,
            "mechanism": self.mechanism,
            **asdict(self.case),
        }
        if self.series:
            line["series"] = self.series
        if self.skipped is not None:
            return {**line, "skipped": self.skipped}
        first, third = self.quartiles
        line |= {"seconds": self.median, "quartiles": [first, third], "samples": list(self.samples)}
        line |= {"repeats": self.repeats, "speedup": self.speedup}
        if self.repeats == 1 and len(self.samples) >= 100:
            line["p99"] = percentile(self.samples, 99)
            line["samples"] = [round(x, 7) for x in self.samples]  # there are many
        return {**line, "peak_bytes": self.peak and self.peak.bytes, "peak_method": self.peak and self.peak.method}


def percentile(samples: Sequence[float], part: int) -> float:
    """The smallest sample that `part` hundredths of them do not exceed."""
    return sorted(samples)[math.ceil(len(samples) * part / 100) - 1]


@dataclass
class Forecast:
    """Time and memory of one competitor at a longer length, from what shorter ones took."""

    seen: list[tuple[int, float, float]] = field(default_factory=list)  # length, seconds, bytes

    @property
    def longest(self) -> int:
        return self.seen[-1][0] if self.seen else 0

    def add(self, length: int, seconds: float, size: int) -> None:
        self.seen = sorted([*(entry for entry in self.seen if entry[0] != length), (length, seconds, float(size))])

    def at(self, length: int) -> tuple[float, float] | None:
        """(seconds, bytes) of one call, or None when nothing is known.

        Growth lies between linear and quadratic. For time it is what the last two lengths show; for memory it is taken
        as quadratic, because running out of it ends the process.
        """
        if not self.seen:
            return None
        last, seconds, size = self.seen[-1]
        growth = max(length / last, 1.0)
        power = 2.0
        if len(self.seen) > 1:
            before, earlier, _ = self.seen[-2]
            power = min(max(math.log(seconds / earlier) / math.log(last / before), 1.0), 2.0)
        return seconds * growth**power, size * growth**2


def measure(
    cases: Iterable[Case],
    competitors: Sequence[Competitor],
    *,
    rounds: int = 7,
    seconds: float = 5.0,
    report: Report = lambda text: None,
) -> Iterator[Timing]:
    """Yield a Timing of every competitor in every case, shorter cases first so that longer ones can be forecast.

    rounds   samples of a competitor at most; fewer when `seconds`, the budget of one competitor in one case, runs out.
    report   is told in words what is running.
    """
    meter = Meter(rounds=rounds, seconds=seconds, report=report)
    for case in sorted(cases, key=lambda case: case.length):
        yield from meter.race(case, competitors)


@dataclass(kw_only=True)
class Meter:
    """Runs races, and remembers what calls took so that longer ones can be forecast.

    seconds   a competitor is skipped where one call would take longer.
    patience  seconds of samples that a competitor gets in one case, `seconds` where not given; one call in any case.
    baseline  samples of SDPA at least: every speed-up rests on them.
    turn      samples that a competitor takes in a row, before the next one's turn.
    sample    seconds that a sample lasts at least, by repeating the call; SAMPLE where not given, 0: a single call.
    """

    rounds: int = 7
    seconds: float = 5.0
    patience: float | None = None
    baseline: int = 1
    report: Report = lambda text: None  # noqa: E731
    turn: int = 1
    sample: float | None = None
    forecasts: dict[tuple[Case, str], Forecast] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.seconds <= 0:
            raise ValueError(f"rounds must be at least 1 and seconds above 0, got {self.rounds} and {self.seconds}")

    def forecast(self, case: Case, line: str) -> Forecast:
        """What is known of one line of a plot: the same case at all lengths."""
        kind = replace(case, length=2**62, left_padding=min(case.left_padding, 1))
        return self.forecasts.setdefault((kind, line), Forecast())

    def race(self, case: Case, competitors: Sequence[Competitor]) -> list[Timing]:
        """A Timing of every competitor in the case."""
        mine = {who.label: self.forecast(case, who.line) for who in competitors}
        for who in competitors:
            for length in _steps(mine[who.label].longest, case):
                self.report(f"approaching {describe(case)}: {who.label} at {length}")
                _try(replace(case, length=length), who, mine[who.label], self, None)
        self.report(describe(case))
        return _race(case, competitors, mine, self)

    def allowed(self, who: Competitor, single: float) -> int:
        """Samples for a competitor whose sample takes `single` seconds."""
        patience = self.seconds if self.patience is None else self.patience
        least = self.baseline if who.is_baseline else 1
        return min(self.rounds, max(least, int(patience / single)))


def _steps(longest: int, case: Case) -> list[int]:
    """Lengths between the longest one seen and the case's, so that a forecast never reaches over a factor of eight."""
    return [length for length in APPROACH if max(2 * longest, case.left_padding + 1) <= length <= case.length // 2]


def describe(case: Case) -> str:
    """The case in words, without what is at its default."""
    words = [f"L={case.length}", case.dtype, case.passes, "causal" if case.causal else "bidirectional"]
    for name, value in asdict(case).items():
        if name not in ("length", "dtype", "passes", "causal") and value != getattr(Case, name):
            words.append(f"{name}={value}")
    return " ".join(words)


@dataclass
class _Runner:
    """One competitor on its way through a case."""

    who: Competitor
    call: Callable[[], Any]
    repeats: int
    allowed: int
    peak: Peak
    samples: list[float]


def _race(case: Case, competitors: Sequence[Competitor], forecasts: dict[str, Forecast], meter: Meter) -> list[Timing]:
    inputs = make_inputs(case)
    entered: dict[str, _Runner | str] = {}
    for who in competitors:
        meter.report(f"{describe(case)}: first call of {who.label}")
        entered[who.label] = _try(case, who, forecasts[who.label], meter, inputs)
    runners = [entry for entry in entered.values() if isinstance(entry, _Runner)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(math.ceil(meter.rounds / meter.turn)):
            for runner in runners[turn % max(len(runners), 1) :] + runners[: turn % max(len(runners), 1)]:
                for _ in range(min(meter.turn, runner.allowed - len(runner.samples))):
                    runner.samples.append(_sample(runner.call, runner.repeats, case.device))
    finally:
        if collecting:
            gc.enable()
    for runner in runners:
        forecasts[runner.who.label].add(case.length, median(runner.samples), runner.peak.bytes)
    baseline = next((median(runner.samples) for runner in runners if runner.who.is_baseline), None)
    return [_timing(case, who, entered[who.label], baseline) for who in competitors]


def _try(case: Case, who: Competitor, forecast: Forecast, meter: Meter, inputs: Inputs | None) -> "_Runner | str":
    """The first call of a competitor: a runner ready for its turns, or the reason why it takes none."""
    expected = forecast.at(case.length)
    if expected is not None:
        free = available_memory(case.device)
        if expected[0] > meter.seconds:
            return f"one call would take about {expected[0]:.0f} s, over the budget of {meter.seconds:g} s"
        if expected[1] > 0.8 * free:
            return f"one call might take {expected[1] / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    try:
        call = workload(case, who, make_inputs(case) if inputs is None else inputs)
        if expected is None:  # the first call of all also loads libraries and starts threads
            call()
        took: list[float] = []
        peak = peak_memory(lambda: took.append(_sample(call, 1, case.device)), case.device)
        single = took[0]
        if single < NO_WARM_UP:
            single = _sample(call, 1, case.device)
    except CannotRun as error:
        return str(error)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU allocator raises a plain one
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        return f"out of memory: {str(error).splitlines()[0]}"
    forecast.add(case.length, single, peak.bytes)
    repeats = max(1, math.ceil((SAMPLE if meter.sample is None else meter.sample) / single))
    return _Runner(
        who, call, repeats, meter.allowed(who, single * repeats), peak, [single] if single >= NO_WARM_UP else []
    )


def _sample(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one call, over `repeats` in a row."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def _timing(case: Case, who: Competitor, entry: "_Runner | str", baseline: float | None) -> Timing:
    form = None if who.mechanism is None else who.mechanism.to_dict()
    if isinstance(entry, str):
        return Timing(label=who.label, mechanism=form, case=case, series=who.series, skipped=entry)
    speedup = None if baseline is None else baseline / median(entry.samples)
    return Timing(
        label=who.label, mechanism=form, case=case, series=who.series, samples=tuple(entry.samples),
        repeats=entry.repeats, peak=entry.peak, speedup=speedup,
    )  # fmt: skip
