"""Layouts on two processes: every one trains to the losses and weights of one process."""

import pytest
import torch

from tests.parallel.ranks import run
from tests.parallel.trainings import on_ranks, train
from tests.training.tiny import write_texts

LAYOUTS = {
    "data": {},
    "shard": {"shard": 2},
    "tensor": {"tensor_parallel": 2},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts", count=12)


def assert_same(got, expected, first, last):
    """Relative differences of losses: `first` after one step, `last` after all; and of weights."""
    for name in ("loss", "norm"):
        assert len(got[name]) == len(expected[name]) > 2
        for step, (one, other) in enumerate(zip(got[name], expected[name], strict=True)):
            allowed = first if step < 2 else last
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
        print(name, {k: v for k, v in two[0][name].items() if k != "weights"})
        assert_same(two[0][name], one, 1e-6, 1e-3)
        assert two[1][name]["loss"] == two[0][name]["loss"]
