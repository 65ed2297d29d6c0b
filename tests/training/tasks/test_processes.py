"""Two processes train as one does on the same rows of each step."""

import json
import os
import subprocess
import sys

import pytest

from tests.training.tasks.tiny_tasks import SMALL, pairs_file
from tests.training.tiny import RECIPES

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.mark.slow
def test_losses_and_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    """Labels differ in number between the halves of a step, so means of means would be seen."""
    given = ["--task", "translation", "--train_file", pairs_file(tmp_path, 21), "--columns", "source=0", "target=1",
             "--validation_share", "0.25", "--train_sampling_strategy", "sequential", "--learning_rate", "1e-2",
             "--warmup_steps", "0"]  # fmt: skip
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        more = ["--per_device_train_batch_size", 4 // processes, "--max_steps", 3, "--output_dir", out]
        done = subprocess.run(
            [
                sys.executable,
                *TORCHRUN,
                *map(str, [processes, RECIPES / "finetune_seq2seq.py", *SMALL, *given, *more]),
            ],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((out / "dense" / "metrics.json").read_text())
        losses = [h["loss"] for h in record["history"] if "loss" in h]
        found[processes] = [*losses, record["test"]["test_loss"], record["test"]["test_bleu"]]
    assert len(found[1]) == 5
    assert found[2] == pytest.approx(found[1], rel=1e-4)
