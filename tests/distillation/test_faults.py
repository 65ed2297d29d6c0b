"""Distillation that is stopped, and launches that it cannot follow: a checkpoint and the same losses, or a refusal."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_tfast.distillation.arguments import DistillationArguments
from hf_tfast.distillation.encoder import EncoderArguments
from hf_tfast.distillation.trainer import DistillationTrainer
from hf_tfast.training.faults import Terminated
from tests.distillation.test_trainer import changed, stages, trainer, weights
from tests.distillation.tiny_lm import Rows, llama, windowed
from tests.distillation.tiny_lm import arguments as quick
from tests.training.tiny import RECIPES, arguments, load, write_texts

RECIPE = RECIPES / "distill_lm.py"
SMALL = shlex.split(
    "--length 32 --max_steps 4 --layer_steps 3 --validation_sequences 2 --far 8 --plot false --disable_tqdm true "
    "--use_cpu true --logging_steps 1 --eval_steps 2 --save_steps 100 --speed_rounds 0 --report_to none"
)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CUT = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
LAUNCHES = {  # environment of `accelerate launch` with a file of recipes/accelerate, and what is said of it
    "fsdp2": (SHARDED, "the layout is shard 2"),
    "tensor": ({**CUT, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "the layout is tensor 2"),
    "sequence": ({**CUT, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "the layout is sequence 2"),
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed cuts or wraps them.*ddp.yaml"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM cuts or wraps them"),
}
FLAGS = {
    "shard": ({"shard": 2}, "the layout is shard 2: launch it with .*ddp.yaml"),
    "tensor": ({"tensor_parallel": 2}, "the layout is tensor 2"),
    "sequence": ({"sequence_parallel": 2}, "the layout is sequence 2"),
    "pipeline": ({"pipeline_parallel": 2}, "the layout is pipeline 2"),
    "hybrid": ({"shard": 2, "replicas": 2}, "the layout is shard 2, replicas 2"),
    "averaging": ({"average_every": 4}, "averages in every step: leave --average_every out"),
}


@pytest.mark.parametrize(("flags", "words"), FLAGS.values(), ids=FLAGS)
def test_layouts_by_flags_are_refused(flags, words, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4" if "replicas" in flags else "2")
    with pytest.raises(ValueError, match=f"^distillation .*{words}"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, plot=False, **flags)


@pytest.mark.parametrize(("environment", "words"), LAUNCHES.values(), ids=LAUNCHES)
def test_layouts_of_the_launcher_are_refused(environment, words, monkeypatch, tmp_path):
    """By a trainer that somebody calls with Transformers' own arguments, and by those of both recipes."""
    teacher = llama()
    own = quick(tmp_path)
    for name, value in {**environment, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^distillation .*{words}"):
        DistillationTrainer(model=windowed(teacher), teacher=teacher, args=own, train_dataset=Rows())
    with pytest.raises(ValueError, match=f"^distillation .*{words}"):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"^the healing of encoders .*{words}"):
        EncoderArguments(output_dir=str(tmp_path), use_cpu=True)


def signalled(monkeypatch, *at):
    """SIGTERM to this process in the middle of these training steps, counted over all trainings."""
    original, count = DistillationTrainer.training_step, [0]

    def step(trainer, *given, **more):
        loss = original(trainer, *given, **more)
        count[0] += 1
        if count[0] in at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(DistillationTrainer, "training_step", step)


def losses(done):
    return [(h["step"], h["loss"], h["learning_rate"]) for h in done.state.log_history if "loss" in h]


@pytest.mark.parametrize("at", [2, pytest.param(6, marks=pytest.mark.slow)])
@stages
def test_sigterm_saves_and_the_next_losses_are_the_same(objective, at, monkeypatch, tmp_path):
    """In the second step, and in the last one: then no step is taken twice."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "whole", objective, **options)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    signalled(monkeypatch, at)
    stopped = trainer(tmp_path / "stopped", objective, **options)
    stopped.train()
    assert stopped.terminate.stopped
    assert stopped.state.global_step == at
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [f"checkpoint-{at}"]
    assert all(p.requires_grad for p in stopped.model.parameters())
    monkeypatch.undo()
    again = trainer(tmp_path / "stopped", objective, **options)
    again.train(resume_from_checkpoint=True)
    assert not again.terminate.stopped
    assert losses(again) == losses(whole)
    assert not changed(weights(whole.model), again.model)


@pytest.fixture(scope="module")
def recipe():
    return load("distill_lm")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Texts, a teacher of them, and what says so."""
    from hf_tfast.training.run import pretrain

    folder = tmp_path_factory.mktemp("given")
    texts = write_texts(folder / "texts")
    pretrain(*arguments(texts, folder / "out", max_steps=4, learning_rate=1e-2))
    return [*SMALL, "--text", str(texts), "--teacher", str(folder / "out" / "model"), "--students", "window"]


def curves(record):
    """What the stages of a record measured; without times, and Trainer's sums over one call."""
    keys = ("loss", "eval_", "grad_norm", "learning_rate", "step")
    return {
        name: {
            "final": stage["final"],
            "steps": stage.get("steps"),
            "history": [{k: v for k, v in h.items() if k.startswith(keys)} for h in stage.get("history", ())],
        }
        for name, stage in record["stages"].items()
    }


def test_the_recipe_ends_well_in_every_stage(recipe, given, monkeypatch, tmp_path):
    """SIGTERM in stage 1, in its last step, in stage 2 and in the last step of all: each time with exit code 0."""
    (whole,) = recipe.main([*given, "--output_dir", str(tmp_path / "whole")])
    out = tmp_path / "out"
    stopped = [*given, "--output_dir", str(out), "--resume_from_checkpoint", "last"]
    signalled(monkeypatch, 1, 3, 5, 7)
    for stage, step in (("layers", 1), ("layers", 3), ("logits", 2), ("logits", 4)):
        with pytest.raises(Terminated, match=f"SIGTERM after step {step}, saved in .*{stage}") as ended:
            recipe.main(stopped)
        assert ended.value.code == 0
        assert (out / "window" / stage / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").is_file()
        assert not (out / "window" / "metrics.json").exists()
    (again,) = recipe.main(stopped)
    assert curves(again) == curves(whole)
    for name in ("layers", "logits"):
        assert len([h for h in again["stages"][name]["history"] if "loss" in h]) == again["stages"][name]["steps"]


@pytest.mark.slow
def test_a_process_of_its_own_exits_with_0(given, tmp_path):
    out = tmp_path / "out"
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-u", str(RECIPE), *given, "--output_dir", str(out), "--max_steps", "100000"]
    with subprocess.Popen(
        command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "'loss'" in line and (out / "window" / "logits").exists():
                process.send_signal(signal.SIGTERM)
                break
        said += process.stdout.readlines()
    assert process.returncode == 0, "".join(said)[-3000:]
    (saved,) = (out / "window" / "logits" / "checkpoints").iterdir()
    assert torch.load(saved / "optimizer.pt", weights_only=True)["state"]
