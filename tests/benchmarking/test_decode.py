"""The suite `decode` at short lengths: what a step computes, what its cache holds, and its page."""

import json

import pytest
import torch
from transformers.cache_utils import DynamicCache

from hf_tfast import Dense, Mask, TopK, Window, attend
from hf_tfast.benchmarking import decode, decode_steps, speed
from hf_tfast.benchmarking.campaign import Run, conduct, races
from hf_tfast.benchmarking.decode_pages import markdown
from hf_tfast.benchmarking.decode_steps import InPlace, bytes_held, steps
from hf_tfast.benchmarking.memory import Peak
from hf_tfast.benchmarking.speed import Meter, percentile
from hf_tfast.benchmarking.workload import Case, Competitor

SIZE = {"heads": 4, "kv_heads": 2, "width": 8}
TINY = {"intermediate_size": 16, "vocab_size": 16}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(decode_steps.SHAPES, "attention", {**TINY, "num_hidden_layers": 1})
    monkeypatch.setitem(decode_steps.SHAPES, "model", {**TINY, "num_hidden_layers": 2})
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: (call(), Peak(0, "kernel"))[1])  # collects garbage
    decode_steps.forget()
    yield
    decode_steps.forget()


def case(length=40, **given):
    return Case(length=length, level="model", **{**SIZE, **given})


@pytest.mark.parametrize("what", ["attention", "model"])
def test_dense_steps_agree_whatever_holds_the_keys(what):
    """The same weights and the same drawn keys; a full budget is dense attention."""
    with torch.no_grad():
        outputs = [
            [steps(what, case(), fast, in_place).call() for _ in range(3)]
            for fast, in_place in ((None, False), (None, True), (Window(window=64), False), (TopK(k=64), False))
        ]
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_step_reads_what_the_cache_was_filled_with():
    made = steps("attention", case(), None, True)
    layer = made.cache.layers[0]
    with torch.no_grad():
        first = made.call()
    k, v = layer.keys[:, :, :41], layer.values[:, :, :41]
    assert layer.held == 41
    free = made.call.__closure__
    q = next(
        c.cell_contents for c in free if isinstance(c.cell_contents, torch.Tensor) and c.cell_contents.shape[1] == 4
    )
    assert torch.allclose(first, attend(q, k, v, Dense(), Mask(causal=True)).transpose(1, 2), atol=1e-5)


def test_bytes_are_those_of_the_storage():
    """Of the window as much at any length; of dense caches all keys and values, without room that is still free."""
    held = {}
    for length in (300, 600):
        for name, fast, in_place in (
            ("in place", None, True),
            ("all", None, False),
            ("window", Window(window=16), False),
        ):
            held[name, length] = bytes_held(steps("attention", case(length), fast, in_place))
    token = 2 * 2 * 8 * 4
    assert held["in place", 600] == held["all", 600] == 601 * token
    assert held["window", 300] == held["window", 600] < 80 * token
    layer = steps("attention", case(600), Window(window=16), False).cache.layers[0]
    tensors = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (layer.keys, layer.values)}
    assert sum(tensors.values()) == held["window", 600]


def test_a_full_cache_says_so():
    layer = InPlace(4)
    x = torch.zeros(1, 1, 3, 2)
    layer.update(x, x)
    with pytest.raises(ValueError, match="room for 4 tokens and was given 6"):
        layer.update(x, x)
    assert isinstance(steps("attention", case(), None, False).cache, DynamicCache)


def test_samples_in_a_row_are_single_calls():
    order = []

    def build(name):
        return lambda case, inputs: (lambda: order.append(name) or torch.zeros(1), ())

    who = [Competitor(n, series=n, build=build(n)) for n in "ab"]
    timings = Meter(rounds=6, turn=3, sample=0.0).race(case(8), who)
    assert [len(t.samples) for t in timings] == [6, 6]
    assert "".join(order[-12:]) == "aaabbbbbbaaa"
    assert all(t.repeats == 1 for t in timings)


def test_percentiles():
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0


@pytest.mark.parametrize("name", decode.WHO)
def test_everybody_takes_steps(name):
    made = steps("attention", case(), decode.WHO[name], False)
    assert bytes_held(made) > 0
    with torch.no_grad():
        assert made.call().isfinite().all()


def test_the_suite_and_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "WHO", {"Window": Window(window=16), "TopK": TopK(k=16, block=8, window=8)})
    run = Run(out=tmp_path / "r", lengths=(24, 48), dtypes=("fp32",), rounds=100, base=SIZE)
    folder, records = conduct(decode.SUITE, run, lambda text: None)
    timings = [r for r in records if r["kind"] == "timing"]
    assert len(timings) == 2 * (2 + len(decode.WHO) + 2 + len(decode.MODEL))
    assert not [r for r in timings if "skipped" in r]
    assert all(r["repeats"] == 1 and len(r["samples"]) == 100 for r in timings)
    assert all(r["quartiles"][1] <= r["p99"] <= max(r["samples"]) for r in timings)
    page = markdown(records)
    assert page == (folder / "table.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("###")] == [
        "### Attention of one layer, fp32", "### Llama-like model, fp32"
    ]  # fmt: skip
    base, window = (next(r for r in timings if r["series"] == f"attention, {who}" and r["length"] == 48)
                    for who in ("SDPA", "Window"))  # fmt: skip
    row = next(line for line in page.splitlines() if line.startswith("| 48 | Window "))
    assert f"{base['seconds'] / window['seconds']:.2f}x" in row
    assert (folder / "decode.png").stat().st_size > 5000
    again = Run(out=folder, resume=True, lengths=(24, 48), dtypes=("fp32",), rounds=100, base=SIZE)
    assert conduct(decode.SUITE, again, lambda text: None)[1] == json.loads(json.dumps(records))


def test_only_the_forward_pass_exists():
    assert {c.passes for c in races(decode.SUITE, Run(lengths=(8,)))} == {"forward"}
    with pytest.raises(ValueError, match="leave out --passes both"):
        races(decode.SUITE, Run(lengths=(8,), passes=("both",)))
