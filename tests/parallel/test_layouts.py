"""Layouts on two processes: every one trains to the losses and weights of one process."""

import pytest
import torch

from tests.parallel.ranks import run
from tests.parallel.trainings import LAYOUTS, on_ranks, train
from tests.training.tiny import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts", count=12)


def assert_same(got, expected, first, last):
    """Relative differences of losses: `first` after one step, `last` after all; and of weights."""
    for name in ("loss", "norm"):
        assert len(got[name]) == len(expected[name]) > 2
        for step, (one, other) in enumerate(zip(got[name], expected[name], strict=True)):
            # AdamW divides rounding by rounding where a gradient is nothing else: the next norm tells of it
            early = first if name == "loss" else 10 * first
            allowed = early if step < 2 else last
            assert one == pytest.approx(other, rel=allowed), f"{name} of step {step + 1}"
    assert got["eval"] == pytest.approx(expected["eval"], rel=last)
    more = got["weights"].keys() - expected["weights"].keys()
    assert more <= {"lm_head.weight"}, "FSDP2 saves tied weights under both names"
    for name in more:
        assert torch.equal(got["weights"][name], got["weights"]["model.embed_tokens.weight"])
    for name, weight in expected["weights"].items():
        assert torch.allclose(got["weights"][name], weight, rtol=0, atol=last), name


def test_layouts_train_as_one_process(texts, tmp_path):
    one = train(texts, tmp_path / "one")[0]
    two = run(on_ranks, 2, texts, tmp_path / "two", 2, LAYOUTS, group=False)
    for name in LAYOUTS:
        assert_same(two[0][name], one, 1e-6, 1e-3)
        assert two[1][name]["loss"] == two[0][name]["loss"]


LONG = {"max_steps": 20, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}


@pytest.mark.slow
def test_twenty_steps_of_accumulated_gradients(texts, tmp_path):
    """1e-3 after 20 updates, in both directions of attention."""
    for two_way in (False, True):
        given = {**LONG, "two_way": two_way}
        one = train(texts, tmp_path / f"one-{two_way}", **{**given, "per_device_train_batch_size": 2})[0]
        cut = {n: {**LAYOUTS[n], **given, "per_device_train_batch_size": 2} for n in ("tensor", "sequence")}
        runs = {"data": given, "shard": {"shard": 2, **given}, **cut}
        if two_way:  # hides tokens by row and epoch, the same on every layout
            runs.pop("sequence")
        two = run(on_ranks, 2, texts, tmp_path / f"two-{two_way}", 2, runs, group=False, timeout=500)
        for name in runs:
            assert_same(two[0][name], one, 1e-6, 1e-3)


@pytest.mark.slow
def test_four_processes(texts, tmp_path):
    """Two kinds of sharing at once, and what `replicas` means with each."""
    one = train(texts, tmp_path / "one")[0]
    runs = {
        "tensor x shard": {"tensor_parallel": 2, "shard": 2},
        "shard x replicas": {"shard": 2, "replicas": 2},
        "tensor x replicas": {"tensor_parallel": 2},
        "sequence x replicas": {"sequence_parallel": 2},
        "data": {},
    }
    four = run(on_ranks, 4, texts, tmp_path / "four", 4, runs, group=False, timeout=500)
    for name in runs:
        assert_same(four[0][name], one, 1e-6, 1e-3)


RESUMED = {"max_steps": 6, "save_steps": 3, "eval_steps": 3}


def half(texts, out, ranks, options):
    """Three of six steps, as if the process had been killed then."""
    try:
        train(texts, out, ranks, **RESUMED, **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("the training was not stopped")


def stop_at(step):
    from hf_tfast.training.trainer import PretrainingTrainer

    def stopped(self, *given, **more):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return whole(self, *given, **more)

    whole, PretrainingTrainer.training_step = PretrainingTrainer.training_step, stopped
    return whole


def broken(texts, folder, ranks, runs):
    """On a rank: every run up to its fourth step."""
    from hf_tfast.training.trainer import PretrainingTrainer

    whole = stop_at(3)
    for name, options in runs.items():
        cut = options.get("tensor_parallel", 1) * options.get("sequence_parallel", 1)
        half(texts, folder / name, ranks // cut, options)
    PretrainingTrainer.training_step = whole


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_goes_on_under_another(texts, tmp_path):
    """Weights, states of the optimiser and schedule of the first half, by every layout, continued by another."""
    from hf_tfast.training.trainer import PretrainingTrainer

    one = train(texts, tmp_path / "one", **RESUMED)[0]
    whole = stop_at(3)
    half(texts, tmp_path / "single", 1, {})
    PretrainingTrainer.training_step = whole
    run(broken, 2, texts, tmp_path, 2, LAYOUTS, group=False, timeout=300)
    again = {"resume_from_checkpoint": "last", **RESUMED}
    pairs = {"single": "tensor", "data": "shard", "tensor": "sequence", "sequence": "data"}
    runs = {before: {**LAYOUTS[after], **again} for before, after in pairs.items()}
    two = run(on_ranks, 2, texts, tmp_path, 2, runs, group=False, timeout=300)
    found = {name: two[0][name] for name in pairs}
    found["shard"] = train(texts, tmp_path / "shard", **again)[0]
    for name in LAYOUTS:
        assert_same(found[name], one, 1e-6, 1e-3)
        assert found[name]["loss"][3] == pytest.approx(one["loss"][3], rel=1e-5), f"first loss after {name}"
