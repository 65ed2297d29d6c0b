"""DistillationTrainer: Transformers' Trainer, whose loss is the distance of a student from its teacher.

    DistillationTrainer(model=student, teacher=teacher, objective=LayerMatching(), args=args, train_dataset=rows)
    DistillationTrainer(model=student, teacher=teacher, objective=LogitMatching(), args=args, train_dataset=rows)

The first is stage 1 (see `layerwise`), the second stage 2 (see `whole`); either is a whole training with Trainer's
schedules, clipping, early stopping, checkpoints and resumption. Losses are divided by the kept tokens of a whole step,
over all its batches and processes, so that a step is the same however it is cut.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollator

from ..training.evaluation import Evaluation, Sums
from ..training.packing import collate
from ..training.scaled import Scaled
from ..training.scaling import check_whole_models
from ..training.trainer import Clock, Diverged
from ._batch import inner, main_input
from .cache import CachedTeacher
from .divergence import advice, first_bad_module, not_finite
from .layerwise import LayerMatching, Layerwise
from .losses import IGNORED
from .whole import LogitMatching, Whole, check_vocabularies

__all__ = ["DistillationTrainer"]


class DistillationTrainer(Scaled, Trainer):
    """As Trainer, with a teacher.

    model        the student: any Transformers model, with a plan or without, or one that PEFT has wrapped.
    teacher      a Transformers model (a plan with Int8 feed-forwards makes it cheaper), or a `CachedTeacher`. It is
                 put in eval mode and on the student's device; its weights stay as they are.
    objective    LayerMatching (stage 1) or LogitMatching (stage 2, the default).
    lora         a PEFT LoraConfig: the student is wrapped with it, and only its adapters train. `merged()` is the
                 student with what they learned.
    evaluation   hf_tfast.training's Evaluation of held-out rows, whose metrics then replace those of Trainer; or
                 leave it out and give eval_dataset, whose eval_loss is the loss of distillation.

    ValueError for a teacher and a student that do not fit, a data set that does not fill a step, and launches that
    cut models over processes. Diverged where loss or gradients are not finite: it says where that began, and no
    checkpoint holds weights from after.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step

    def __init__(
        self,
        model: Any = None,
        teacher: PreTrainedModel | CachedTeacher | None = None,
        objective: LayerMatching | LogitMatching | None = None,
        *,
        args: TrainingArguments | None = None,
        lora: Any = None,
        evaluation: Evaluation | None = None,
        **options: Any,
    ) -> None:
        objective = LogitMatching() if objective is None else objective
        theirs = _check_pair(model, teacher, options.get("model_init"))
        if lora is not None:
            model = _with_lora(model, lora)
        self.teacher: Any = teacher
        self.work: Layerwise | Whole
        if isinstance(objective, LayerMatching):
            self.work = Layerwise(objective, model, teacher)
        else:
            check_vocabularies(inner(model), _vocabulary(theirs), objective)
            self.work = Whole(objective, model, theirs)
        if evaluation is not None:
            options = {"eval_dataset": evaluation.rows, "data_collator": collate, **options}
        _check_rows(options.get("train_dataset"), inner(model), options.get("data_collator"))
        args = TrainingArguments("trainer_output") if args is None else args
        check_whole_models(args, "distillation")
        _for_processes(args, objective)
        super().__init__(model=model, args=args, **options)
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs in one process: start one process each, with accelerate launch or torchrun")
        self.model_accepts_loss_kwargs = True  # count the tokens of a step
        self.evaluation, self.clock = evaluation, Clock()
        self.add_callback(self.clock)
        self.add_callback(_Guard(every=isinstance(self.work, Layerwise)))
        self._terms: dict[str, Tensor] = {}
        self._active: list[int] | None = None
        self._check_size()
        if isinstance(teacher, PreTrainedModel):
            teacher.eval()
            if getattr(teacher, "hf_device_map", None) is None:
                teacher.to(self.args.device)  # type: ignore[arg-type]

    def merged(self) -> PreTrainedModel:
        """The student itself; LoRA's adapters are merged into its weights, and PEFT's wrapper is gone."""
        student = self.accelerator.unwrap_model(self.model)
        return student.merge_and_unload() if hasattr(student, "merge_and_unload") else student

    def train(self, *given: Any, **options: Any) -> Any:
        """As Trainer.train; parameters that stage 1 does not train are frozen meanwhile."""
        student: Any = self.model
        flags = [(p, p.requires_grad) for p in student.parameters()]
        try:
            if isinstance(self.work, Layerwise):
                self._train_only(self.work.trained())
            else:
                self.work.attach()
            return super().train(*given, **options)
        finally:
            self._active = None
            if isinstance(self.work, Whole):
                self.work.detach()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the objective's terms over the kept tokens, divided by those of the step."""
        training = model.training
        outputs: Any = {}
        with self.accelerator.autocast():  # of the teacher too; the student's own is within
            if isinstance(self.work, Layerwise):
                terms = self.work.terms(model, inputs, num_items_in_batch, self._layers(training))
            else:
                terms, outputs = self.work.terms(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # data parallelism averages gradients over processes, while the count is of all of them
            share = self.accelerator.num_processes // self.get_tp_size()
            terms = {name: term * share for name, term in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        if training:
            if not loss.requires_grad:
                raise ValueError(f"the parameters that train never reach the loss: {self._trained()}")
            if not math.isfinite(float(loss.detach())):
                raise Diverged(self._where(terms, model, inputs, num_items_in_batch))
            for name, term in terms.items():
                self._terms[name] = self._terms.get(name, 0.0) + term.detach()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss of distillation, whether the data has labels or not."""
        if not (prediction_loss_only or isinstance(self.work, Layerwise) or "labels" not in inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        prepared = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([prepared], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, prepared, num_items_in_batch=count)
        return loss.detach(), None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's evaluation; with `evaluation` its metrics (loss on labels, perplexity, loss of far tokens)."""
        if self.evaluation is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None and eval_dataset is not self.evaluation.rows:
            raise ValueError("this trainer evaluates the rows that its Evaluation was made of; make another one")
        metrics = evaluate(self, self.model, self.evaluation, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Training losses come with their terms, all entries with the seconds of training so far."""
        if "loss" in logs and self._terms:
            total = sum(float(x) for x in self._terms.values())
            shares = {name: float(x) / total if total else 0.0 for name, x in self._terms.items()}
            if len(shares) > 1:
                logs = {**logs, **{f"loss {name}": logs["loss"] * share for name, share in shares.items()}}
            self._terms = {}
        super().log({**logs, "seconds": round(self.clock.seconds, 3)}, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Where layers train one at a time each has a schedule of its own."""
        if not (isinstance(self.work, Layerwise) and self.work.objective.one_at_a_time):
            return super().create_scheduler(num_training_steps, optimizer)
        share = self.work.share(num_training_steps)
        scheduler = super().create_scheduler(share, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"layers one at a time need a schedule that is a function of the step, lr_scheduler_type="
                f"{self.args.lr_scheduler_type} is not; take linear, cosine or constant"
            )
        scheduler.lr_lambdas = [_again(of_step, share) for of_step in scheduler.lr_lambdas]
        return scheduler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The tokens that count in these batches; gathered over processes as Trainer does with labels."""
        kept = [self.work.kept(batch) for batch in batch_samples]
        return super()._get_num_items_in_batch(
            [{"labels": k, "shift_labels": torch.where(k, 0, IGNORED)} for k in kept], device
        )

    def _layers(self, training: bool) -> Sequence[int]:
        """The layers of this step; those that have had their turn, and those to come, are frozen."""
        work = self.work
        if not isinstance(work, Layerwise):
            raise TypeError("only stage 1 has layers of its own")
        if not training:
            return list(work.map)
        layers = work.active(self.state.global_step, self.state.max_steps)
        if layers != self._active:
            self._train_only(work.trained(layers))
            self._active = layers
        return layers

    def _train_only(self, names: Sequence[str]) -> None:
        chosen = set(names)
        for name, parameter in inner(self.accelerator.unwrap_model(self.model)).named_parameters():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None

    def _trained(self) -> str:
        student: Any = self.model
        names = [name for name, p in student.named_parameters() if p.requires_grad]
        return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}" if names else "all are frozen"

    def _check_size(self) -> None:
        size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None  # type: ignore[arg-type]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if size is not None and size < step:
            raise ValueError(
                f"the training data has {size} rows, and one step takes {step}: give more data, shorter rows, or a "
                "smaller batch (per_device_train_batch_size, gradient_accumulation_steps)"
            )

    def _where(self, terms: dict[str, Tensor], model: Any, inputs: dict[str, Any], count: Any) -> str:
        terms = {name: term.detach() for name, term in terms.items()}
        bad = [name for name, term in terms.items() if not math.isfinite(float(term))]
        value = float(next((terms[name] for name in bad), math.nan))
        where = None
        for who, net in (("teacher", self.teacher), ("student", inner(self.accelerator.unwrap_model(model)))):
            if where is None and isinstance(net, PreTrainedModel):

                def again() -> None:
                    if isinstance(self.work, Layerwise):
                        self.work.terms(model, inputs, count, list(self.work.map))
                    else:
                        self.work.terms(model, inputs, count)

                where = first_bad_module(net, again)
                where = where and f"in the {who} {where}"
        return advice(f"the loss ({', '.join(bad) or 'sum'})", value, where, self.state.global_step + 1, self.args)


class _Guard(TrainerCallback):
    """Before weights are touched: are all gradients finite? And is there one for `every` parameter that trains?"""

    def __init__(self, every: bool) -> None:
        self.every = every

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [(n, p) for n, p in kwargs["model"].named_parameters() if p.requires_grad]
        missing = [name for name, p in named if p.grad is None]
        if self.every and missing:
            raise ValueError(
                f"{len(missing)} parameters train but never reach the loss, {missing[0]} for one: name others "
                "(LayerMatching(train=...)), or freeze them"
            )
        if args.fp16:  # its scaler skips such steps by itself
            return
        norm = float(torch.nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not None]))
        if not math.isfinite(norm):
            bad = not_finite((name, p.grad) for name, p in named)
            where = f"{len(bad)} of {len(named)} gradients are not finite, {bad[0]} for one" if bad else None
            raise Diverged(advice("the gradient", norm, where, state.global_step + 1, args))


def _again(of_step: Callable[[int], float], share: int) -> Callable[[int], float]:
    """A schedule that begins anew every `share` steps; a plain function, which checkpoints leave out."""

    def scale(step: int) -> float:
        return of_step(step % share)

    return scale


def evaluate(trainer: Trainer, model: Any, evaluation: Evaluation, prefix: str = "eval") -> dict[str, float]:
    """Metrics of any model on held-out rows, over all processes of a trainer."""
    rank, world = trainer.args.process_index, trainer.args.world_size
    mine = evaluation.sums(model, rank=rank, world=world, context=trainer.accelerator.autocast()).tensor()
    if world > 1:
        mine = trainer.accelerator.gather(mine[None].to(trainer.args.device)).cpu().sum(0)
    return Sums.of(mine).metrics(prefix, evaluation.two_way)


def _check_pair(model: Any, teacher: Any, model_init: Any) -> PreTrainedModel | CachedTeacher:
    if not isinstance(model, torch.nn.Module) or model_init is not None:
        raise ValueError("give the student as model=; model_init is not supported, for the teacher would not fit it")
    if not isinstance(teacher, PreTrainedModel | CachedTeacher):
        raise ValueError(f"teacher is a Transformers model or a CachedTeacher, got {type(teacher).__name__}")
    if isinstance(teacher, PreTrainedModel):
        theirs = {p.data_ptr(): name for name, p in teacher.named_parameters() if p.numel()}
        shared = [name for name, p in inner(model).named_parameters() if p.numel() and p.data_ptr() in theirs]
        if shared:
            raise ValueError(
                f"student and teacher share {len(shared)} parameters ({shared[0]}): the teacher would change as the "
                "student learns; load it again, or copy.deepcopy it"
            )
    return teacher


def _for_processes(args: TrainingArguments, objective: LayerMatching | LogitMatching) -> None:
    """Data parallelism must not look for unused parameters in outputs: distillation takes more than these."""
    if args.world_size == 1:
        return
    if isinstance(objective, LayerMatching) and objective.one_at_a_time:
        raise ValueError("layers go one at a time in one process: others wait for gradients of all that train")
    if args.ddp_find_unused_parameters:
        raise ValueError("leave ddp_find_unused_parameters out: outputs do not show what distillation uses")
    args.ddp_find_unused_parameters = False  # Trainer would switch it on


def _with_lora(model: Any, lora: Any) -> Any:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError:
        raise ImportError('LoRA needs peft: pip install "hf_tfast[lora]"') from None
    if not isinstance(lora, PeftConfig):
        raise ValueError(f"lora is a PEFT config, LoraConfig(r=8, target_modules=[...]) say, got {lora!r}")
    return get_peft_model(model, lora)


def _vocabulary(teacher: Any) -> int:
    if isinstance(teacher, CachedTeacher):
        return teacher.vocabulary
    return int(getattr(teacher.config.get_text_config(), "vocab_size", 0))


def _check_rows(rows: Any, student: PreTrainedModel, collator: DataCollator | None) -> None:
    """Rows that a model can be called with, as far as the first one tells."""
    if rows is None or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return
    if not len(rows):
        raise ValueError("the training data has no rows")
    row = rows[0]
    if not isinstance(row, dict):
        raise ValueError(f"a row is a dict of what the student is called with, got {type(row).__name__}")
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if texts and collator is None and "input_ids" not in row:
        raise ValueError(
            f"the training data has columns of text ({', '.join(texts)}) and no input_ids: tokenise it first, "
            "dataset.map(lambda x: tokenizer(x['text'])), or use recipes/distill_lm.py"
        )
    if collator is None or collator is collate:
        values = main_input({k: torch.as_tensor(v) for k, v in row.items() if not isinstance(v, str)})
        if not values.numel():
            raise ValueError("the first row of the training data is empty: leave out texts without tokens")
