"""Recipes' training as a pipeline and over shared sequences: the curve, checkpoints and model of one process."""

from types import SimpleNamespace

import pytest

from hf_tfast.testing import assert_near
from hf_tfast.training.layout import Layout
from hf_tfast.training.piped import PipelineTrainer
from hf_tfast.training.trainer import PretrainingTrainer
from tests.parallel.ranks import run
from tests.parallel.trainings import train
from tests.training.tiny import write_texts

RUNS = {  # name: how processes share the training
    "pipeline": {"pipeline_parallel": 2, "per_device_train_batch_size": 4, "save_steps": 2},
    "interleaved": {"pipeline_parallel": 2, "pipeline_stages": 2, "per_device_train_batch_size": 4},
    "sequence": {"sequence_parallel": 2, "per_device_train_batch_size": 4},
}
MODEL = {"layers": 4}


def on_rank(texts, folder, names, two_way=False):
    return {name: train(texts, f"{folder}/{name}", model=MODEL, two_way=two_way, **RUNS[name])[0] for name in names}


def assert_same(found, expected, name):
    for here, there in zip(found["loss"], expected["loss"], strict=True):
        assert abs(here - there) <= 2e-5 * there, f"loss of {name}"  # logs are rounded
    for here, there in zip(found["norm"], expected["norm"], strict=True):
        assert abs(here - there) <= 1e-4 * there, f"gradient norm of {name}"
    assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    assert found["tokens"] == expected["tokens"]
    assert set(found["weights"]) == set(expected["weights"])
    for key, x in expected["weights"].items():
        assert_near(found["weights"][key], x, f"{key} of {name}", 1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    texts = write_texts(tmp_path / "texts")
    expected = train(texts, tmp_path / "one", model=MODEL)[0]
    found = run(on_rank, 2, texts, str(tmp_path), list(RUNS), group=False, timeout=280)[0]
    for name in RUNS:
        assert_same(found[name], expected, name)


@pytest.mark.slow
def test_an_encoder(tmp_path):
    texts = write_texts(tmp_path / "texts")
    expected = train(texts, tmp_path / "one", model=MODEL, two_way=True)[0]
    found = run(on_rank, 2, texts, str(tmp_path), ["pipeline"], two_way=True, group=False, timeout=280)[0]
    assert_same(found["pipeline"], expected, "pipeline")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"fp16": True}, "in bf16 or fp32, not in fp16"), ({"train_batch_size": 1}, "needs 2 of them: raise .* to 2")],
)
def test_what_a_pipeline_refuses(fields, words):
    given = {"layout": Layout(pipeline=2), "fp16": False, "train_batch_size": 2, **fields}
    with pytest.raises(ValueError, match=words):
        PipelineTrainer(model=None, args=SimpleNamespace(**given))


FOUR = {  # the rows of a step are shared by two pipelines of two processes
    "pipeline x replicas": {"pipeline_parallel": 2, "per_device_train_batch_size": 2},
    "accumulated": {"pipeline_parallel": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "pipeline of four": {"pipeline_parallel": 4, "per_device_train_batch_size": 4},
}


def on_four(texts, folder):
    return {name: train(texts, f"{folder}/{name}", model=MODEL, **FOUR[name])[0] for name in FOUR}


@pytest.mark.slow
def test_replicas_of_a_pipeline(tmp_path):
    """Four processes: losses, norms and weights of one."""
    texts = write_texts(tmp_path / "texts", count=12)
    expected = train(texts, tmp_path / "one", model=MODEL)[0]
    twice = train(texts, tmp_path / "twice", model=MODEL, gradient_accumulation_steps=2)[0]
    for found in run(on_four, 4, texts, str(tmp_path), group=False, timeout=500):
        for name in FOUR:
            assert_same(found[name], twice if name == "accumulated" else expected, name)


RESUMED = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "model": MODEL}


def stopped(texts, out, trainer, options):
    """Three of six steps, as if the processes had been killed in the fourth."""
    original = trainer.training_step

    def step(self, *given, **more):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *given, **more)

    trainer.training_step = step
    try:
        with pytest.raises(KeyboardInterrupt):
            train(texts, out, **{**options, **RESUMED})
    finally:
        trainer.training_step = original


def resumed(texts, folder):
    """On a rank: a pipeline that is stopped and goes on, also from the interleaved stages and from one process."""
    found = {}
    for name in ("pipeline", "interleaved"):
        stopped(texts, f"{folder}/{name}", PipelineTrainer, RUNS[name])
    for name, options in {"interleaved": "pipeline", "pipeline": "pipeline", "single": "interleaved"}.items():
        given = {**RUNS[options], "resume_from_checkpoint": "last", **RESUMED}
        found[name] = train(texts, f"{folder}/{name}", **given)[0]
    stopped(texts, f"{folder}/left", PipelineTrainer, RUNS["pipeline"])
    return found


@pytest.mark.slow
def test_a_pipeline_goes_on(tmp_path):
    """The next losses are those of an unbroken training; from a pipeline, to one, and from one to a single process."""
    texts = write_texts(tmp_path / "texts", count=12)
    one = {"per_device_train_batch_size": 4}
    unbroken = train(texts, tmp_path / "unbroken", **RESUMED)[0]
    stopped(texts, tmp_path / "single", PretrainingTrainer, one)
    found = run(resumed, 2, texts, str(tmp_path), group=False, timeout=500)[0]
    found["left"] = train(texts, tmp_path / "left", resume_from_checkpoint="last", **RESUMED)[0]
    for name in ("pipeline", "interleaved", "single", "left"):
        assert_same(found[name], unbroken, name)
        assert found[name]["loss"][3] == pytest.approx(unbroken["loss"][3], rel=1e-5), f"first loss after {name}"
