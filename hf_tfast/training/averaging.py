"""Local SGD in Trainer: data-parallel processes that take steps alone and average their weights now and then."""

from contextlib import AbstractContextManager
from typing import Any

from accelerate.local_sgd import LocalSGD
from transformers import TrainerCallback

from ..parallel.data import DelayedAverage

__all__ = ["Averaging"]


class Averaging(TrainerCallback):
    """--average_every H: accelerate's LocalSGD, which waits for all; with --average_delay D, averages that arrive D
    steps later (see `hf_tfast.parallel.data`). `drift`: how far this process was from the last mean, |w - m| / |m|.

    Before a checkpoint or an evaluation all processes are made equal, so a checkpoint is the model that was evaluated.
    It holds the first process's states of the optimiser.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.local: LocalSGD | None = None
        self.delayed: DelayedAverage | None = None
        self.alone: AbstractContextManager[Any] | None = None
        self.drift: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size < 2:
            raise ValueError(f"--average_every {args.average_every} averages over processes, and there is only one")
        model = self.trainer.model_wrapped
        if args.average_delay:
            self.delayed = DelayedAverage(model.parameters(), args.average_every, args.average_delay)
            self.alone = model.no_sync()
            self.alone.__enter__()
        else:
            self.local = LocalSGD(self.trainer.accelerator, model, args.average_every)
            self.local.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        average = self.local or self.delayed
        if average is None:
            return
        if average is self.local:
            self._step_together()
        else:
            average.step()
            self.drift = average.drift
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush()
        if self.local is not None:
            self.local.__exit__(None, None, None)
        if self.alone is not None:
            self.alone.__exit__(None, None, None)

    def _step_together(self) -> None:
        """LocalSGD's step, and how far from the mean this process was."""
        local: Any = self.local
        due = (local.num_steps + 1) % local.local_sgd_steps == 0
        before = [p.detach().clone() for p in local.model.parameters()] if due else []
        local.step()
        if due:
            pairs = list(zip(local.model.parameters(), before, strict=True))
            apart = sum(float((p.detach().float() - w.float()).square().sum()) for p, w in pairs)
            size = sum(float(p.detach().float().square().sum()) for p, _ in pairs)
            self.drift = (apart / size) ** 0.5 if size else 0.0

    def _flush(self) -> None:
        if self.delayed is not None:
            self.delayed.flush()
        elif self.local is not None and self.local.num_steps % self.local.local_sgd_steps:
            self.local._sync_and_avg_model_params()
