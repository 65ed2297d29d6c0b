"""Transformers' Trainer that stops when a training diverges, keeps its own time and evaluates token by token."""

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..benchmarking.memory import peak_memory
from .evaluation import Evaluation, Sums
from .packing import collate
from .scaled import Scaled
from .states import gradient_norm

__all__ = ["Diverged", "PretrainingTrainer", "not_finite"]


class Diverged(ArithmeticError):
    """The loss or its gradient is no longer a finite number. No checkpoint holds weights from after that."""


class Clock(TrainerCallback, ExportableState):
    """Seconds spent in steps of training alone, kept in checkpoints; evaluating and saving do not count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began = 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.seconds = saved.get("attributes", {}).get("seconds", 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds += time.perf_counter() - self.began


class Watch(TrainerCallback):
    """Before weights are touched: are all gradients finite?

    And tells the rows which epoch it is: accelerate does so in a single process, of several it tells the sampler only.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:  # its scaler skips such steps by itself
            return
        norm = gradient_norm(kwargs["model"].parameters())
        if not math.isfinite(norm):
            raise not_finite("the gradient", norm, state, args)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = kwargs["train_dataloader"].dataset
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(int(state.epoch or 0))


class PretrainingTrainer(Scaled, Trainer):
    """As Trainer; `evaluation` replaces its evaluation loop, so that every evaluation has the loss of far tokens.

    Logs carry `seconds` of training so far. Raises Diverged, naming the step, where loss or gradients are not finite.
    """

    def __init__(self, *, evaluation: Evaluation, **options: Any) -> None:
        super().__init__(eval_dataset=evaluation.rows, data_collator=collate, **options)
        self.evaluation, self.clock = evaluation, Clock()
        self.add_callback(self.clock)
        self.add_callback(Watch())

    def training_step(self, *given: Any, **options: Any) -> Tensor:
        loss = super().training_step(*given, **options)
        if not math.isfinite(float(loss)):
            raise not_finite("the loss", float(loss), self.state, self.args)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of `Sums.metrics` over all processes. The data set is that of `evaluation`; another is refused."""
        if eval_dataset is not None and eval_dataset is not self.evaluation.rows:
            raise ValueError(
                "this trainer evaluates the rows that its Evaluation was made of; make another Evaluation"
            )
        context = self.accelerator.autocast()
        with self.whole_rows():
            mine = self.evaluation.sums(
                self.model, rank=self.data_rank, world=self.data_ranks, context=context
            ).tensor()
        if self.args.world_size > 1:
            everybody = self.accelerator.gather(mine[None].to(self.args.device)).cpu()
            mine = everybody.sum(0) * (self.data_ranks / self.args.world_size)  # some have scored the same rows
        metrics = Sums.of(mine).metrics(metric_key_prefix, self.evaluation.two_way)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def step_memory(self) -> int:
        """Bytes that one more forward and backward need at their peak above what is held: activations and gradients.

        Measured after training, when all that is allocated once is there, and without touching weights.
        """
        model = self.model_wrapped.train()
        rows = [self.train_dataset[n] for n in range(self.args.train_batch_size)]  # type: ignore[index]
        batch = {name: x.to(self.args.device) for name, x in collate(rows).items()}

        def step() -> None:
            with self.accelerator.autocast():
                loss = self.batch_loss(model, batch)
            loss.backward()

        step()
        model.zero_grad()
        peak = peak_memory(step, self.args.device)
        model.zero_grad()
        return peak.bytes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": round(self.clock.seconds, 3)}, start_time)


def not_finite(what: str, value: float, state: Any, args: Any) -> Diverged:
    """The error for a loss or gradient of `value`, with advice."""
    return Diverged(
        f"{what} became {value} at step {state.global_step + 1}: the training has diverged and was stopped; lower "
        f"--learning_rate (now {args.learning_rate}), raise --warmup_steps or lower --max_grad_norm. The last good "
        f"checkpoint, if one was saved, is in {args.output_dir}"
    )
