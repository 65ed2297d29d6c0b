"""What kills a training: lost processes, SIGTERM, a full disk, other versions; and what it goes on from."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hf_tfast import TFastConfig
from hf_tfast.training import launch
from hf_tfast.training.faults import CheckpointError, Terminated
from hf_tfast.training.guards import check_launch
from hf_tfast.training.launch import check_sizes
from hf_tfast.training.layout import Layout
from hf_tfast.training.trainer import PretrainingTrainer
from tests.parallel.ranks import run
from tests.parallel.trainings import result, train
from tests.training.tiny import write_texts

OPTIONS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "model": {"model": '{"hidden_dropout": 0.1}'}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts", count=12)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    return train(texts, tmp_path_factory.mktemp("runs") / "whole", **OPTIONS)[0]


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_equal(found, expected):
    assert found["loss"] == expected["loss"]
    assert found["eval"] == expected["eval"]
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


def during(monkeypatch, step, action):
    """Do it in the middle of this step: after its backward pass, before weights are touched."""
    original = PretrainingTrainer.training_step

    def interrupted(self, *given, **more):
        loss = original(self, *given, **more)
        if self.state.global_step == step:
            action()
        return loss

    monkeypatch.setattr(PretrainingTrainer, "training_step", interrupted)


def test_sigterm_saves_and_ends_well(texts, tmp_path, whole, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    during(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated) as ended:
        train(texts, tmp_path / "out", **OPTIONS)
    assert ended.value.code == 0
    assert "ended by SIGTERM after step 3" in str(ended.value)
    assert signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]
    monkeypatch.undo()
    assert_equal(train(texts, tmp_path / "out", resume_from_checkpoint="last", **OPTIONS)[0], whole)


def fill_the_disk(left):
    """From now on no file of this process grows beyond `left` bytes, and whoever tries gets an error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_old_checkpoint(texts, tmp_path, whole, monkeypatch):
    """Writing fails in the middle of the optimiser's file, as on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    during(monkeypatch, 3, lambda: fill_the_disk(60_000))
    try:
        with pytest.raises(CheckpointError, match="checkpoint-4 could not be written .* MiB are free there"):
            train(texts, tmp_path / "out", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert names(tmp_path / "out") == ["checkpoint-2"]
    monkeypatch.undo()
    assert_equal(train(texts, tmp_path / "out", resume_from_checkpoint="last", **OPTIONS)[0], whole)


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json", "model.safetensors"])
def test_a_kill_while_writing_leaves_no_checkpoint(texts, tmp_path, whole, monkeypatch, file):
    """Whatever is half written has no checkpoint's name, and goes away with the next one."""
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    original = PretrainingTrainer._save_rng_state

    def killed(self, folder):
        original(self, folder)
        if self.state.global_step == 4:
            (Path(folder) / file).write_bytes(b"{")
            raise Killed

    monkeypatch.setattr(PretrainingTrainer, "_save_rng_state", killed)
    with pytest.raises(Killed):
        train(texts, out, **OPTIONS)
    assert names(out) == [".writing-4", "checkpoint-2"]
    monkeypatch.undo()
    assert_equal(train(texts, out, resume_from_checkpoint="last", **OPTIONS)[0], whole)
    assert names(out) == ["checkpoint-4", "checkpoint-6"]


def disagreeing(how):
    """On a rank: what the check before every training says when rank 1 differs."""
    arguments = SimpleNamespace(world_size=2, device=torch.device("cpu"), fp16=False)
    if dist.get_rank() == 1:
        original = launch.versions
        launch.versions = lambda: {**original(), **how}
    try:
        check_launch(arguments)
    except ValueError as error:
        return str(error)
    finally:
        if dist.get_rank() == 1:
            launch.versions = original
    return None


def on_one_rank(cases):
    return [disagreeing(case) for case in cases]


def test_ranks_must_agree():
    own = "hf_tfast (digest of its source)"
    assert own in launch.versions()
    cases = [{}, {"torch": "2.12.1"}, {own: "abc"}]
    for answers in run(on_one_rank, 2, cases):
        assert answers[0] is None
        assert f"process 0 has torch {torch.__version__} and process 1 has 2.12.1" in answers[1]
        assert "digest of its source" in answers[2]


@pytest.mark.parametrize(
    ("layout", "fields", "length", "words"),
    [
        ({"tensor": 3}, {"num_attention_heads": 4, "hidden_size": 32}, 32, "4 do not divide evenly"),
        ({"tensor": 4}, {"num_attention_heads": 8, "num_key_value_heads": 2}, 32, "key/value heads, and 2"),
        ({"tensor": 4}, {"intermediate_size": 50}, 32, "intermediate_size.*50"),
        ({"sequence": 4}, {}, 30, "rows of 30 tokens over 4 processes"),
        ({"pipeline": 3}, {"num_hidden_layers": 2}, 32, "a pipeline of 3 processes needs as many layers"),
    ],
)
def test_sizes_that_do_not_divide(layout, fields, length, words):
    config = TFastConfig(**{"num_attention_heads": 8, "hidden_size": 32, "intermediate_size": 64, **fields})
    check_sizes(Layout(tensor=2, sequence=2), TFastConfig(hidden_size=32, num_attention_heads=4), 32)
    with pytest.raises(ValueError, match=words):
        check_sizes(Layout(**layout), config, length)


KILLING = """
import json, os, signal, sys
from hf_tfast.training.piped import PipelineTrainer
from hf_tfast.training.trainer import PretrainingTrainer
from hf_tfast.training.run import pretrain
from tests.training.tiny import arguments
from tests.parallel.test_faults import OPTIONS, fill_the_disk
from tests.parallel.trainings import train

texts, out, victims, kind, layout = sys.argv[1:6]
layout = json.loads(layout)
trainer = PipelineTrainer if "pipeline_parallel" in layout else PretrainingTrainer
original = trainer.training_step

def step(self, *given, **more):
    loss = original(self, *given, **more)
    mark = f"{out}.killed-{os.environ['RANK']}"
    if self.state.global_step == 4 and os.environ["RANK"] in victims.split(",") and not os.path.exists(mark):
        open(mark, "w").close()
        if kind.isdigit():
            fill_the_disk(int(kind))
        else:
            os.kill(os.getpid(), getattr(signal, kind))
    return loss

trainer.training_step = step
options = {**OPTIONS, "resume_from_checkpoint": "last", **layout}
train(texts, out, int(os.environ["WORLD_SIZE"]), **options)
"""


def torchrun(tmp_path, texts, out, victims, kind, *options, layout=None):
    (tmp_path / "script.py").write_text(KILLING)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
         "--rdzv_endpoint", "127.0.0.1:0", *options, str(tmp_path / "script.py"), str(texts), str(out), victims, kind,
         json.dumps(layout or {})],
        capture_output=True, text=True, timeout=500, check=False, cwd=root,
        # without the last one torch 2.13 gives restarted gloo processes the addresses of those that died
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(texts, tmp_path_factory):
    """The result of two processes that nothing happens to, by layout; each is trained once."""
    found = {}

    def of(layout=None):
        name = json.dumps(layout or {})
        if name not in found:
            folder = tmp_path_factory.mktemp("unbroken")
            done = torchrun(folder, texts, folder / "out", "", "SIGKILL", layout=layout)
            assert done.returncode == 0, done.stderr[-3000:]
            found[name] = result(folder / "out")
        return found[name]

    return of


def near(found, expected):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name, weight in expected["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("victims", ["1", "0,1"])
def test_killed_processes_go_on(texts, tmp_path, unbroken, victims):
    """kill -9 in the middle of a step, of one process and of all: the same command goes on, to the same losses."""
    out = tmp_path / "out"
    died = torchrun(tmp_path, texts, out, victims, "SIGKILL")
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    assert not (out / "metrics.json").exists()
    again = torchrun(tmp_path, texts, out, victims, "SIGKILL")
    assert again.returncode == 0, again.stderr[-3000:]
    near(result(out), unbroken())


PIPELINE = {"pipeline_parallel": 2, "per_device_train_batch_size": 4, "model": {"layers": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PIPELINE, {"shard": 2}], ids=["pipeline", "shard"])
def test_killed_parts_go_on(texts, tmp_path, unbroken, layout):
    """Processes that hold parts of a model: the first is killed, torchrun starts all anew from the checkpoint."""
    options = ["--max_restarts", "1"]
    done = torchrun(tmp_path, texts, tmp_path / "out", "0", "SIGKILL", *options, layout=layout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.killed-0").exists()
    near(result(tmp_path / "out"), unbroken(layout))


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(texts, tmp_path, unbroken):
    """--max_restarts: no hand is needed."""
    done = torchrun(tmp_path, texts, tmp_path / "out", "1", "SIGKILL", "--max_restarts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.killed-1").exists()
    near(result(tmp_path / "out"), unbroken())


@pytest.mark.slow
def test_sigterm_to_one_of_two(texts, tmp_path, unbroken):
    """All stop after the same step, with one checkpoint, and exit with 0."""
    done = torchrun(tmp_path, texts, tmp_path / "out", "1", "SIGTERM")
    assert done.returncode == 0, done.stderr[-3000:]
    assert names(tmp_path / "out")[-1] == "checkpoint-5"
    assert not (tmp_path / "out" / "metrics.json").exists()
    again = torchrun(tmp_path, texts, tmp_path / "out", "1", "SIGTERM")
    assert again.returncode == 0, again.stderr[-3000:]
    near(result(tmp_path / "out"), unbroken())


LEFT = "another process left while it was written"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "victims", "left"),
    [({}, "0", 60_000), ({}, "1", 0), ({"shard": 2}, "0,1", 60_000), ({"shard": 2}, "0", 0)],
    ids=["whole", "whole-second", "shard", "shard-at-once"],
)
def test_a_full_disk_ends_both(texts, tmp_path, unbroken, layout, victims, left):
    """Not even half of the optimiser's file fits, or nothing does; the other process waits for a part of the weights,
    or to be told that all is written. Both say what happened, the checkpoint before is whole, and training goes on."""
    out, patient = tmp_path / "out", ("--monitor_interval", "20")  # torchrun ends the other when it sees one end
    full = torchrun(tmp_path, texts, out, victims, str(left), *patient, layout=layout)
    assert full.returncode != 0
    told = re.findall(r"CheckpointError: checkpoint-6 could not be written to \S+ \(\d+ MiB are free .*", full.stderr)
    assert len(told) == 2, full.stderr[-5000:]
    assert sum(LEFT in line for line in told) == 1, told
    assert all("make room and go on with --resume_from_checkpoint last" in line for line in told)
    assert names(out) == ["checkpoint-2", "checkpoint-4"]
    again = torchrun(tmp_path, texts, out, victims, str(left), layout=layout)
    assert again.returncode == 0, again.stderr[-3000:]
    near(result(out), unbroken(layout))
