"""Long suites: what is there after an interruption is kept and continued; pages say what the records say."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hf_tfast.attention import mechanisms
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import budgets, campaign, module_pages, modules, pages, peer_pages, speed
from hf_tfast.benchmarking.campaign import Run, conduct, races
from hf_tfast.benchmarking.ledger import read
from hf_tfast.benchmarking.suites import LONG, long_suite
from hf_tfast.benchmarking.workload import SDPA, Case, Competitor

DOCS = Path(__file__).parents[2] / "docs"
SIZE = {"heads": 2, "kv_heads": 2, "width": 8}
RUN = Run(lengths=(32, 16), dtypes=("fp32",), passes=("forward",), rounds=2, base=SIZE, plots=False)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)


@pytest.fixture
def few(monkeypatch):
    """The suite `modules` with one mechanism."""
    who = [SDPA, Competitor("Window(window=4)", Window(window=4), series="Window")]
    return replace(modules.SUITE, competitors=lambda case, records: who)


def silent(text):
    pass


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


def test_races_are_short_ones_first():
    found = races(modules.SUITE, Run(lengths=(64, 32), base=SIZE))
    assert [c.length for c in found] == [32] * 8 + [64] * 8
    assert len({*found}) == 16
    assert {(c.level, c.heads, c.causal, c.content) for c in found} == {("module", 2, c, "normal") for c in (0, 1)}
    assert all(c.content == "topics" and not c.causal for c in races(long_suite("peers"), RUN))


def test_every_mechanism_has_budgets_for_speed_and_fidelity():
    assert set(budgets.SPEED) == set(mechanisms()) == set(budgets.FIDELITY)


@pytest.mark.parametrize("causal", [False, True])
def test_a_race_has_every_mechanism_that_has_such_a_form(causal):
    who = modules.competitors(Case(length=256, causal=causal, level="module"), [])
    assert who[0] is SDPA
    able = [cls.__name__ for cls in mechanisms().values() if cls.causal or not causal]
    assert [c.series for c in who[1:]] == able


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1024, 4096])
def test_topk_reads_a_tenth(causal, length):
    case = Case(length=length, causal=causal, level="module", heads=1, kv_heads=1)
    share = modules.density(case, budgets.speed_budget("topk", length, causal))
    assert 0.1 <= share < (0.13 if length > 1024 else 0.19)


def test_an_interrupted_suite_is_continued(tmp_path, few, monkeypatch):
    out, seen = tmp_path / "out", []
    original = speed.Meter.race

    def race(meter, case, who):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(case)
        return original(meter, case, who)

    monkeypatch.setattr(speed.Meter, "race", race)
    with pytest.raises(KeyboardInterrupt):
        conduct(few, replace(RUN, out=out), silent)
    kept = read(out / "results.jsonl")
    assert len(of(kept, "timing")) == 4
    monkeypatch.setattr(speed.Meter, "race", original)
    _, records = conduct(few, replace(RUN, out=out, resume=True), silent)
    assert records[: len(kept)] == kept
    timings = of(records, "timing")
    assert len(timings) == len({(r["label"], r["length"], r["causal"]) for r in timings}) == 8
    assert len(of(records, "environment")) == 2, "every session says what it ran on"
    densities = [(r["series"], r["length"], r["causal"]) for r in of(records, "density")]
    assert len(densities) == len(set(densities)) > 4
    assert (out / "table.md").read_text() == module_pages.markdown(records)
    before = (out / "results.jsonl").read_text()
    conduct(few, replace(RUN, out=out, resume=True), silent)
    assert (out / "results.jsonl").read_text() == before, "nothing is left to measure"


def test_a_limit_of_minutes_stops_between_races(tmp_path, few, monkeypatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(campaign.time, "monotonic", lambda: next(clock))
    told = []
    _, records = conduct(few, replace(RUN, out=tmp_path / "out", minutes=1.5), told.append)
    assert len(of(records, "timing")) == 2
    assert any("continue with --resume" in text for text in told)


def test_forecasts_are_remembered(tmp_path, few):
    out = tmp_path / "out"
    _, records = conduct(few, replace(RUN, out=out, lengths=(16,)), silent)
    told = []
    conduct(few, replace(RUN, out=out, resume=True, seconds=1e-9), told.append)
    skipped = [r for r in of(read(out / "results.jsonl"), "timing") if "skipped" in r]
    assert {r["length"] for r in skipped} == {32}
    assert all("over the budget" in r["skipped"] for r in skipped)
    assert "not run at 32" in module_pages.markdown(read(out / "results.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modules", "peers"])
def test_quick_suites_run_whole(name, tmp_path):
    """Both suites as they are, at a length where most peers refuse, with their plots."""
    run = Run(out=tmp_path / "out", lengths=(128, 256), dtypes=("fp32",), rounds=1, base=SIZE)
    folder, records = conduct(long_suite(name), run, silent)
    series = {r.get("series", "SDPA") for r in of(records, "timing")}
    text = (folder / "table.md").read_text()
    assert all(name in text for name in series)
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == ({"peers.png"} if name == "peers" else {
        "speedup.png", "time-causal.png", "time-bidirectional.png", "memory-causal.png", "memory-bidirectional.png"
    })  # fmt: skip
    if name == "peers":
        assert {r["hashes"] for r in of(records, "match")} == {1, 4}
        refused = [r for r in of(records, "timing") if "skipped" in r]
        assert {r["series"].split(",")[0] for r in refused} >= {"BigBird"}
        assert "multiples of 256" in text


def test_bad_runs():
    with pytest.raises(ValueError, match="dtypes must be of fp32"):
        Run(dtypes=("fp8",))
    with pytest.raises(ValueError, match="lengths must be at least 1"):
        Run(lengths=())


@pytest.mark.parametrize(
    ("points", "words", "number"),
    [
        ([(1024, 2.0), (4096, 3.0)], "1024, the shortest", 1024),
        ([(1024, 0.5), (4096, 2.0)], "about 2000", 2000),
        ([(4096, 2.0), (1024, 0.5)], "about 2000", 2000),
        ([(1024, 2.0), (4096, 0.9), (16384, 1.0)], "about 16000", 16000),
        ([(1024, 2.0), (4096, 0.9)], "never up to 4096", None),
        ([], "not measured", None),
    ],
)
def test_wins_from(points, words, number):
    assert pages.wins_from(points) == (words, number)


def test_pages_are_renewed_between_their_markers():
    begin, end = "<!-- peers: made by `tfast ... --update` -->", "<!-- end of peers -->"
    page = f"before\n{begin}\nold\n{end}\nafter"
    again = pages.renewed(page, "peers", "new\n")
    assert again == f"before\n{begin}\n\nnew\n\n{end}\nafter"
    assert pages.renewed(again, "peers", "new\n") == again
    with pytest.raises(ValueError, match="expected one line"):
        pages.renewed(page, "modules", "new")


@pytest.mark.parametrize("name", LONG)
def test_the_committed_page_says_what_the_committed_records_say(name):
    folder = DOCS / "results" / f"speed-{name}"
    if not folder.exists():
        pytest.skip(f"{folder.name} has not been measured yet")
    records = read(folder / "results.jsonl")
    text = long_suite(name).markdown(records)
    assert (folder / "table.md").read_text(encoding="utf-8") == text
    every = [path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")]
    page = next(page for page in every if f"<!-- {name}: made by" in page)
    assert pages.renewed(page, name, text) == page
    for picture in re.findall(rf"results/speed-{name}/[\w-]+\.png", page):
        assert (DOCS / picture).is_file()


def test_peers_that_do_not_run_leave_no_figure():
    done = {"kind": "timing", "length": 8, "dtype": "fp32", "passes": "forward", "mechanism": None, "label": "x",
            "samples": [1.0], "repeats": 1, "quartiles": [1.0, 1.0], "speedup": None, "peak_bytes": None}  # fmt: skip
    peer, ours = peer_pages.AGAINST[0]
    records = [{**done, "series": peer, "skipped": "raises"}, {**done, "series": ours, "seconds": 1.0}]
    assert peer_pages.ratio(records, peer, ours, length=8) is None
    assert "raises" in peer_pages.markdown(json.loads(json.dumps(records)))
