"""What may go wrong while a training runs, and what is left then.

A checkpoint is written beside the others and takes its name when all of it is on the disk, so a kill, a full disk or a
lost process leaves the checkpoints before it whole. SIGTERM, which schedulers send before they kill, saves one and
ends the training in good order.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

__all__ = ["CheckpointError", "Terminate", "Terminated", "whole_checkpoint"]

WRITING = ".writing-"


class CheckpointError(OSError):
    """A checkpoint could not be written. Those before it are whole."""


class Terminated(SystemExit):
    """A training that SIGTERM ended: exit code 0, because all that was done is saved."""

    def __init__(self, folder: str, step: int) -> None:
        super().__init__(0)
        self.folder, self.step = folder, step

    def __str__(self) -> str:
        return (
            f"ended by SIGTERM after step {self.step}, saved in {self.folder}; --resume_from_checkpoint last goes on"
        )


class Terminate(TrainerCallback):
    """SIGTERM to any process: after the step, all save a checkpoint and stop. `stopped` tells whether that was so."""

    def __init__(self) -> None:
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts SIGTERM ends nothing but the training. Threads other than the main one cannot listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # signals reach processes at different steps, and all must stop after the same one
        if args.world_size > 1:
            asked = torch.tensor([float(self.asked)], device=args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked.item())
        if self.asked:
            self.stopped = control.should_save = control.should_training_stop = True


@contextmanager
def whole_checkpoint(trainer: Any, trial: Any = None) -> Iterator[Path]:
    """A folder to write checkpoint-<step> into; it moves to where it belongs when every process has written its part.

    trial  of a search for hyper-parameters, whose checkpoints have a folder of their own.
    CheckpointError, with what is left on the disk, where it cannot be written: in the process that cannot, and in the
    others when it has left.
    """
    run = Path(trainer._get_output_dir(trial))
    name, first = f"checkpoint-{trainer.state.global_step}", trainer.args.should_save
    working = run / f"{WRITING}{trainer.state.global_step}"
    if first:
        for torn in run.glob(f"{WRITING}*"):  # a kill left it
            shutil.rmtree(torn)
    _meet(trainer)
    try:
        yield working
        _set_best(trainer, working, run, name)
        if first:
            _to_disk(working / name)
        _meet(trainer)  # a process that could not write its part has left, and the others learn it here
    except Exception as error:
        lost = _left_alone(error)
        if first or lost:  # whoever writes the rest would not find the folder again
            shutil.rmtree(working, ignore_errors=True)
        free = shutil.disk_usage(run if run.exists() else run.parent).free
        why = "another process left while it was written, and its own error says why" if lost else str(error)
        raise CheckpointError(
            f"{name} could not be written to {run} ({free / 2**20:.0f} MiB are free there): {why}. The checkpoints "
            "before it are whole; make room and go on with --resume_from_checkpoint last"
        ) from error
    if first:
        if (run / name).exists():  # of a training that went on from an earlier one
            shutil.rmtree(run / name)
        (working / name).rename(run / name)
        working.rmdir()
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=False,
        )
    _meet(trainer)


def _set_best(trainer: Any, working: Path, run: Path, name: str) -> None:
    """The best checkpoint's path is that where it will be, on every process: all of them will load it."""
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).parent == working:
        trainer.state.best_model_checkpoint = str(run / Path(best).name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(working / name / "trainer_state.json"))


def _to_disk(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _left_alone(error: Exception) -> bool:
    """Did processes fail to talk? They are told no more than that a connection was closed, and gloo does so without a
    class of errors of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _meet(trainer: Any) -> None:
    trainer.accelerator.wait_for_everyone()
