"""Recipes' training as a pipeline and over shared sequences: the curve, checkpoints and model of one process."""

import pytest

from hf_tfast.testing import assert_near
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
