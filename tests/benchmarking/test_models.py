"""The suite `models` on tiny models: who computes what, and its page."""

from importlib.util import find_spec

import pytest
import torch

from hf_tfast import Window
from hf_tfast.attention import Mask, attend
from hf_tfast.benchmarking import exported, models, runtimes, whole_models
from hf_tfast.benchmarking.attention_alone import alone
from hf_tfast.benchmarking.campaign import Run, conduct
from hf_tfast.benchmarking.model_pages import markdown
from hf_tfast.benchmarking.runtimes import onnxruntime, openvino
from hf_tfast.benchmarking.whole_models import NOTHING, encoder, llama
from hf_tfast.benchmarking.workload import CannotRun, Case, make_inputs, workload

CACHES = (whole_models._llama, whole_models.made, runtimes._openvino, runtimes._onnxruntime)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(whole_models, "VOCABULARY", 50)
    monkeypatch.setitem(whole_models.ENCODERS, "MiniLM", TINY)
    monkeypatch.setattr(models, "ENCODERS", {"MiniLM": TINY})
    for each in CACHES:
        each.cache_clear()
    yield
    for each in CACHES:
        each.cache_clear()


def case(**given):
    return Case(**{"level": "model", "length": 40, "causal": True, **given})


def run(build, given, **options):
    with torch.no_grad():
        return build(given, make_inputs(given), **options)[0]()


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_a_wide_window_is_the_dense_model(passes):
    given = case(passes=passes)
    assert torch.allclose(run(llama, given), run(llama, given, fast=Window(window=64)), atol=1e-5)
    assert not torch.allclose(run(llama, given), run(llama, given, fast=Window(window=2)), atol=1e-5)


def test_without_attention_tokens_do_not_meet():
    run(llama, case(), attention=NOTHING)  # registers it
    model = whole_models._llama("fp32", "cpu", 16384, NOTHING, None)
    ids = torch.randint(50, (1, 40))
    other = ids.clone()
    other[:, :39] = (ids[:, :39] + 1) % 50
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[:, -1] for x in (ids, other))
    assert torch.equal(a, b)


def test_a_training_step_reaches_every_weight():
    for options in ({}, {"fast": Window(window=8)}, {"attention": NOTHING}):
        given = case(passes="both")
        inputs = make_inputs(given)
        forward, weights = llama(given, inputs, **options)
        gradients = torch.autograd.grad(forward(), weights, inputs.gradient)
        assert all(g.isfinite().all() for g in gradients)


def test_attention_alone_is_that_of_every_layer():
    given, fast = case(passes="both"), Window(window=8)
    forward, leaves = alone(given, make_inputs(given), fast=fast)
    assert [x.shape[-1] for x in leaves] == [512, 256, 256]
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in leaves)
    first = attend(q, k, v, fast, Mask(causal=True))[0, 0, 0, 0]
    assert torch.allclose(forward(), 4 * first)
    for one, other in zip(torch.autograd.grad(forward(), leaves), torch.autograd.grad(first, leaves), strict=True):
        assert torch.allclose(one, 4 * other, atol=1e-6)
    with pytest.raises(CannotRun, match="forward"):
        alone(case(passes="both", causal=False), None, fast=fast, shape="MiniLM")


def test_an_encoder_without_attention():
    given = case(causal=False)
    assert not torch.allclose(
        run(encoder, given, shape="MiniLM"), run(encoder, given, shape="MiniLM", attention=NOTHING)
    )


def test_encoders_with_a_plan_and_int8():
    from hf_tfast import Int8

    given = case(causal=False, passes="forward")
    dense = run(encoder, given, shape="MiniLM")
    assert torch.allclose(dense, run(encoder, given, shape="MiniLM", fast=Window(window=64)), atol=1e-5)
    small = run(encoder, given, shape="MiniLM", fast=Window(window=64), form=Int8())
    assert 0 < (small - dense).norm() / dense.norm() < 0.05


FAST = (None, Window(window=8, sinks=1))


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.filterwarnings("ignore")  # those of the exporter
@pytest.mark.slow
@pytest.mark.parametrize("fast", FAST)
def test_openvino_runs_the_same_model(fast):
    given = case(causal=False)
    expected = run(encoder, given, shape="MiniLM", fast=fast)
    other = run(openvino, given, shape="MiniLM", fast=fast)
    assert torch.allclose(expected, torch.from_numpy(next(iter(other.values()))), atol=1e-3)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.filterwarnings("ignore")  # those of the exporter
@pytest.mark.parametrize("fast", FAST)
def test_onnxruntime_runs_the_same_model(fast):
    pytest.importorskip("onnxscript")
    given = case(causal=False)
    expected = run(encoder, given, shape="MiniLM", fast=fast)
    assert torch.allclose(expected, torch.from_numpy(run(onnxruntime, given, shape="MiniLM", fast=fast)), atol=1e-4)
    with pytest.raises(CannotRun, match="computes in fp32"):
        run(onnxruntime, case(causal=False, dtype="bf16"), shape="MiniLM")


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    for build, options in ((openvino, {}), (openvino, {"int8": True}), (onnxruntime, {})):
        with pytest.raises(CannotRun, match="not installed"):
            build(case(causal=False), None, shape="MiniLM", **options)
    with pytest.raises(CannotRun, match="forward"):
        workload(case(causal=False, passes="both"), models.competitors(case(causal=False), [])[0], None)


def test_the_suite_and_its_page(tmp_path, monkeypatch):
    for module in (whole_models, runtimes):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    folder, records = conduct(
        models.SUITE, Run(out=tmp_path / "r", lengths=(16, 32), dtypes=("fp32",), rounds=1), print
    )
    timings = [r for r in records if r["kind"] == "timing"]
    assert {r["series"] for r in timings if "skipped" not in r} == {
        *(f"{model}, {who}" for model in ("Llama-like", "MiniLM")
          for who in ("SDPA", "Window", "no attention", "attention of Window alone")),
    }  # fmt: skip
    page = markdown(records)
    assert page == (folder / "table.md").read_text()
    assert "### Llama-like, fp32, forward and backward" in page
    row = next(line for line in page.splitlines() if line.startswith("| 32 | Window "))
    one, base = (next(r["seconds"] for r in timings if r["series"] == f"Llama-like, {who}" and r["length"] == 32
                      and r["passes"] == "forward") for who in ("Window", "SDPA"))  # fmt: skip
    assert f"{base / one:.2f}x" in row
    short = [r for r in timings if r["length"] == 32 and r["passes"] == "forward"]
    parts = sum(r["seconds"] for r in short for who in ("no attention", "attention of Window alone")
                if r["series"] == f"Llama-like, {who}")  # fmt: skip
    assert row.split("|")[-2].strip() == f"{one / parts:.2f}x"
    assert "openvino is not installed" in page
    assert (folder / "models.png").stat().st_size > 5000


def test_the_suite_of_exported_models(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    run_ = Run(out=tmp_path / "r", lengths=(32,), dtypes=("fp32",), rounds=1)
    _, records = conduct(exported.SUITE, run_, print)
    timings = {r["series"]: r for r in records if r["kind"] == "timing"}
    assert set(timings) == {
        f"MiniLM, {who}" for who in ("SDPA", "Window", "ONNX Runtime", "Window in ONNX Runtime", "OpenVINO",
                                     "Window in OpenVINO")
    }  # fmt: skip
    assert "seconds" in timings["MiniLM, Window"]
    assert all("not installed" in timings[f"MiniLM, Window in {who}"]["skipped"] for who in exported.RUNTIMES)
