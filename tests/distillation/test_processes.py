"""Two processes take the step that one takes: rows of very different lengths, so that means of means would differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_tfast.testing import assert_near
from tests.distillation.test_trainer import STAGES, trainer
from tests.distillation.tiny_lm import llama

NAMES = ("layers", "logits")


def distil(out, batch):
    """Weights after two steps of four rows in all, for each objective."""
    found = {}
    for name in NAMES:
        done = trainer(
            out, STAGES[name], teacher=llama().double(), per_device_train_batch_size=batch, max_steps=2, optim="sgd",
            learning_rate=0.5,
        )  # fmt: skip
        done.train()
        model = done.accelerator.unwrap_model(done.model)
        found[name] = {key: p.detach().clone() for key, p in model.named_parameters()}
        found[name]["loss"] = torch.tensor([h["loss"] for h in done.state.log_history if "loss" in h])
    return found


@pytest.mark.slow
def test_two_processes_take_the_same_steps(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], capture_output=True, text=True, timeout=500, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = distil(tmp_path / "alone", 4)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in NAMES:
        for key, w in alone[name].items():
            for rank in range(2):
                assert_near(
                    both[rank][name][key], w, f"{name}: {key} of process {rank}", 1e-6 if key == "loss" else 1e-9
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save(distil(folder / "two", 2), folder / f"{os.environ['RANK']}.pt")
