"""Local SGD in Trainer: data-parallel processes that take steps alone and average their weights now and then."""

from contextlib import AbstractContextManager
from typing import Any

from accelerate.local_sgd import LocalSGD
from transformers import TrainerCallback

from ..parallel.data import DelayedAverage

__all__ = ["Averaging"]


class Averaging(TrainerCallback):
    """--average_every H: accelerate's LocalSGD, which waits for all; with --average_delay D, averages that arrive D
    steps later (see `hf_tfast.parallel.data`).

    Before a checkpoint or an evaluation all processes are made equal, so a checkpoint is the model that was evaluated.
    It holds the first process's states of the optimiser.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.local: LocalSGD | None = None
        self.delayed: DelayedAverage | None = None
        self.alone: AbstractContextManager[Any] | None = None

    @property
    def drift(self) -> float | None:
        return None if self.delayed is None else self.delayed.drift

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
        average.step()
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush()
        if self.local is not None:
            self.local.__exit__(None, None, None)
        if self.alone is not None:
            self.alone.__exit__(None, None, None)

    def _flush(self) -> None:
        if self.delayed is not None:
            self.delayed.flush()
        elif self.local is not None and self.local.num_steps % self.local.local_sgd_steps:
            self.local._sync_and_avg_model_params()
