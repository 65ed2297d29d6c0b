"""The trainer: divergence is seen before weights are touched, resuming repeats an unbroken run, time is kept."""

import json
import math

import pytest
import torch

from hf_tfast.training.run import pretrain
from hf_tfast.training.trainer import Diverged, PretrainingTrainer
from tests.training.tiny import arguments, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts", count=12)


def curve(out):
    history = json.loads((out / "metrics.json").read_text())["history"]
    return [
        {k: v for k, v in h.items() if "loss" in k or k in ("step", "grad_norm", "learning_rate")} for h in history
    ]


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


class Killed(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("two_way", [False, True])
def test_resuming_repeats_an_unbroken_run(texts, tmp_path, monkeypatch, two_way):
    """Killed in the second epoch, resumed: every loss, gradient norm and weight to the last bit; dropout is on."""
    options = {"max_steps": 11, "save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 16,
               "model": {"attention": "window", "model": '{"hidden_dropout": 0.2}'}}  # fmt: skip
    whole = pretrain(*arguments(texts, tmp_path / "whole", **options), two_way=two_way)[0]
    assert whole["history"][-1]["epoch"] > 2, "the test means to cross epochs"
    step = PretrainingTrainer.training_step

    def killed(self, *given, **more):
        if self.state.global_step == 7:
            raise Killed
        return step(self, *given, **more)

    monkeypatch.setattr(PretrainingTrainer, "training_step", killed)
    with pytest.raises(Killed):
        pretrain(*arguments(texts, tmp_path / "broken", **options), two_way=two_way)
    assert not (tmp_path / "broken" / "metrics.json").exists()
    monkeypatch.undo()
    again = pretrain(
        *arguments(texts, tmp_path / "broken", resume_from_checkpoint="last", **options), two_way=two_way
    )[0]
    assert (whole["resumed_at"], again["resumed_at"]) == (None, 6)
    expected, got = curve(tmp_path / "whole"), curve(tmp_path / "broken")
    assert [h for h in expected if "train_loss" not in h] == [h for h in got if "train_loss" not in h]
    assert again["final"]["eval_loss"] == whole["final"]["eval_loss"]
    mine, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert again["tokens_seen"] == whole["tokens_seen"]


def test_a_torn_checkpoint_is_not_resumed_from(texts, tmp_path):
    out = tmp_path / "out"
    pretrain(*arguments(texts, out, max_steps=4))
    (out / "metrics.json").unlink()
    (out / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text(
        '{"epoch": '
    )  # a kill while it was written
    record = pretrain(*arguments(texts, out, max_steps=4, resume_from_checkpoint="last"))[0]
    assert record["resumed_at"] == 3


@pytest.mark.parametrize(("what", "at"), [("loss", 2), ("gradient", 3)])
def test_divergence_stops_before_weights_are_touched(texts, tmp_path, monkeypatch, what, at):
    compute, out = PretrainingTrainer.compute_loss, tmp_path / "out"

    def diverging(self, model, *given, **more):
        loss = compute(self, model, *given, **more)
        if self.state.global_step + 1 < at:
            return loss
        if what == "loss":
            return loss * math.nan
        weight = next(p for p in model.parameters())
        return loss + (weight - weight.detach()).abs().sum().sqrt()  # 0 with an infinite slope

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", diverging)
    with pytest.raises(Diverged, match=f"the {what} became nan at step {at}.*--learning_rate") as error:
        pretrain(*arguments(texts, out, max_steps=5))
    assert str(out / "checkpoints") in str(error.value)
    assert not (out / "metrics.json").exists()
    for checkpoint in (out / "checkpoints").iterdir():
        from safetensors.torch import load_file

        assert all(x.isfinite().all() for x in load_file(checkpoint / "model.safetensors").values())


def test_only_its_own_rows_are_evaluated(texts, tmp_path, monkeypatch):
    made = []

    def stop(self, **options):
        made.append(self)
        raise Killed

    monkeypatch.setattr(PretrainingTrainer, "train", stop)
    with pytest.raises(Killed):
        pretrain(*arguments(texts, tmp_path / "out"))
    with pytest.raises(ValueError, match="make another Evaluation"):
        made[0].evaluate([{}])


def test_time_and_tokens(texts, tmp_path):
    record = pretrain(*arguments(texts, tmp_path / "out", max_steps=3))[0]
    assert record["tokens_seen"] == 3 * 2 * 32
    assert record["tokens_per_second"] == pytest.approx(record["tokens_seen"] / record["training_seconds"])
    seconds = [h["seconds"] for h in record["history"] if "eval_loss" in h]
    assert seconds == sorted(seconds)
    assert len(seconds) == 3
    assert seconds[0] > 0
    activations_at_least = 2 * 32 * 260 * 4  # the logits
    assert record["step_peak_bytes"] > activations_at_least
