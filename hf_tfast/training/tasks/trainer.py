"""Seq2SeqTrainer for every task: one loss (see objective), regularisation, growing batches, exact evaluation."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from ..scaled import Scaled
from ..states import is_cut
from ..trainer import Clock, Watch, not_finite
from ._base import Task
from .arguments import TaskTrainingArguments
from .batches import GrowingBatches
from .examples import Augmented, Collator, Examples
from .generation import generate_texts
from .objective import LABELS, count, nats, r_drop, scores_and_labels, twice
from .optimisers import own_optimiser, own_optimiser_kwargs

__all__ = ["TaskTrainer"]


class TaskTrainer(Scaled, Seq2SeqTrainer):
    """Loss per label, whatever the batches, accumulation and processes; metrics of the task in every evaluation.

    Raises Diverged, naming the step, where loss or gradients are not finite; ValueError for regularisation that the
    model cannot have, and examples that do not fill a step.
    """

    args: TaskTrainingArguments

    def __init__(
        self,
        *,
        task: Task,
        model: nn.Module | None,
        args: TaskTrainingArguments,
        train: Examples | None,
        validation: Examples,
        tokenizer: PreTrainedTokenizerBase,
        new_tokens: int = 64,
        model_init: Any = None,
    ) -> None:
        data: Any = train
        if train is not None and (args.token_dropping or args.token_masking):
            data = Augmented(train, tokenizer, args.token_dropping, args.token_masking, args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id),  # type: ignore[arg-type]
            train_dataset=data,
            eval_dataset=validation,  # type: ignore[arg-type]
            processing_class=tokenizer,
            model_init=model_init,
        )
        self.task, self.tokenizer, self.examples, self.new_tokens = task, tokenizer, train, new_tokens
        self.loss_is_scaled_for_ga = True  # over the whole step, below
        self.made: list[Any] = []  # of the last evaluation, for every row
        self._nats, self._labels = 0.0, 0.0
        if args.r_drop and not _has_dropout(self.model):
            raise ValueError("--r_drop compares two passes with different dropout, and this model has none: --dropout")
        self._check_size()
        self.clock = Clock()
        self.add_callback(self.clock)
        self.add_callback(Watch())
        if args.early_stopping is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping))

    def _check_size(self) -> None:
        rows, step = self.examples, self.args.train_batch_size * self.args.gradient_accumulation_steps
        if rows is not None and len(rows) < step * self.data_ranks:
            raise ValueError(
                f"there are {len(rows)} training examples, and one step takes {step * self.data_ranks}: give more, or "
                "a smaller --per_device_train_batch_size"
            )

    # --- loss

    def training_step(self, *given: Any, **options: Any) -> Tensor:
        loss = super().training_step(*given, **options)
        if not math.isfinite(float(loss)):
            raise not_finite("the loss", float(loss), self.state, self.args)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        total = torch.stack([count(self.task.kind, one).to(device) for one in batch_samples]).sum()
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy per label of the step, with what the arguments add: smoothing, R-Drop, L1."""
        drop = self.args.r_drop if model.training else 0.0
        given = twice(inputs) if drop else dict(inputs)
        outputs = model(**self._inputs(given))
        scores, labels = scores_and_labels(self.task.kind, outputs, given)
        counted = count(self.task.kind, inputs) if num_items_in_batch is None else num_items_in_batch
        loss = nats(scores, labels, self.args.label_smoothing_factor).sum() / (2 if drop else 1)
        if drop:
            loss = loss + drop * r_drop(scores, labels).sum()
        loss = loss / counted * self.accelerator.num_processes  # which are averaged
        if self.args.l1:
            size = sum(p.abs().sum() for p in model.parameters() if p.requires_grad and p.ndim > 1)
            loss = loss + self.args.l1 * size / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with: no labels, so that it computes no loss of its own."""
        inputs = {name: x for name, x in given.items() if name not in LABELS}
        base: Any = self.accelerator.unwrap_model(self.model)
        if base.config.is_encoder_decoder and self.task.generates:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=given["labels"])
        if not self.task.generates:
            return inputs
        return {**inputs, "use_cache": False}

    # --- batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length" or self.examples is None:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(one["input_ids"]) for one in self.examples.features]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(size, lengths=lengths, generator=generator)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.args.grow_batch_to is None:
            return super().get_train_dataloader()
        steps, parts = self.args.max_steps, self.args.gradient_accumulation_steps
        batches = GrowingBatches(
            len(self.examples or ()),
            self._train_batch_size,
            self.args.grow_batch_to,
            batches=steps * parts if steps > 0 else None,
            epochs=self.args.num_train_epochs,
            seed=self.args.seed,
            rank=self.data_rank,
            world=self.data_ranks,
        )
        if steps <= 0:
            self.args.max_steps = max(1, len(batches) // parts)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)  # type: ignore[arg-type]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if own_optimiser(args.optim):
            return own_optimiser_kwargs(args)
        return Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)

    # --- evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **_: Any
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**self._inputs(inputs))
            scores, labels = scores_and_labels(self.task.kind, outputs, inputs)
            mine = torch.stack([nats(scores, labels).sum(-1), (labels >= 0).sum(-1)], dim=1)
        rows = self.accelerator.gather_for_metrics(mine).double().sum(0)
        self._nats, self._labels = self._nats + float(rows[0]), self._labels + float(rows[1])
        if self.task.generates:
            return None, None, None
        if self.task.kind == "span":
            return None, (outputs.start_logits, outputs.end_logits), labels
        return None, outputs.logits, inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """loss: nats per label, exact; perplexity of text tasks; the metrics of the task."""
        self._nats, self._labels = 0.0, 0.0
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer's keeps rows that fill batches up
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        examples: Examples = dataloader.dataset  # type: ignore[assignment]
        loss = self._nats / self._labels
        found = {"loss": loss}
        if self.task.generates:
            found["perplexity"] = math.exp(min(loss, 700.0))
            if self.args.predict_with_generate or metric_key_prefix == "test":
                self.made = self._texts(examples)
                found |= self.task.score_texts(self.made, examples.rows)
        else:
            found |= self.task.score(output.predictions, examples)
            self.made = self.task.answers(output.predictions, examples)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def _texts(self, examples: Examples) -> list[str]:
        """Of all examples, on every process; processes that hold parts of a model must make the same texts."""
        model = self.accelerator.unwrap_model(self.model)
        rank, world = (0, 1) if is_cut(model) else (self.args.process_index, self.args.world_size)
        made = generate_texts(
            model,
            self.tokenizer,
            examples,
            batch=self.args.per_device_eval_batch_size,
            new_tokens=self.args.generation_max_length or self.new_tokens,
            beams=self.args.generation_num_beams or 1,
            share=(rank, world),
            context=self.accelerator.autocast(),
        )
        if world > 1:
            everybody: list[Any] = [None] * world
            torch.distributed.all_gather_object(everybody, made)
            made = {n: text for part in everybody for n, text in part.items()}
        return [made[n] for n in range(len(examples))]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": round(self.clock.seconds, 3)}, start_time)


def _has_dropout(model: Any) -> bool:
    """By modules, and by the fields of its config, for dropout that is a function."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    fields = model.config.to_dict().items()
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in fields)
