"""Heals an encoder that was made long and fast: from queries and their documents, close to what its teacher knew.

    loss = documents + passages * P + keep * K

    documents   cross-entropy of a query's own document among all of the batch, by cosine / temperature
    P           the same for the passages that queries were taken from, cut out of the states of the whole document
                (late chunking), among all passages of the batch
    K           1 - cos between student and teacher: of queries, and of passages, which the teacher reads alone. It
                keeps the teacher's space, where short texts and single passages are at home

    Memory of a step is that of one document: the documents of a batch are computed one after the other, without what
    their backward needs, which is computed again when it comes to them. That is gradient caching in the words of
    torch.utils.checkpoint: the gradient is that of the whole batch, for a third more time.

Several processes   each has the documents of its own batch as wrong answers.
Accumulation        a batch is the documents of one device and step: a larger per_device_train_batch_size gives more
                    wrong answers at no memory, gradient accumulation does not.
Source              Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3,
                    https://arxiv.org/abs/2101.06983; late chunking: Guenther et al., https://arxiv.org/abs/2409.04701
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from ..training.scaled import Scaled
from ..training.scaling import check_whole_models
from ..training.trainer import Clock, Watch, not_finite
from .encoder_rows import Rows, TextEncoder, collate
from .losses import embedding_cosine

__all__ = ["EncoderArguments", "EncoderTrainer", "contrastive_loss", "pooled"]

TOKENS = 4096  # padded tokens of short texts that are computed at once

Evaluate = Callable[[], dict[str, float]]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EncoderArguments(TrainingArguments):
    """TrainingArguments with these defaults; `--help` lists everything."""

    output_dir: str | None = _option("runs/distill_encoder", "a new folder for everything that the training leaves")
    temperature: float = _option(0.05, "of cosines in the cross-entropy")
    passage_weight: float = _option(0.5, "of the loss of passages; 0: none")
    keep_weight: float = _option(1.0, "of the distance to the teacher's vectors of queries and passages; 0: none")
    recompute: bool = _option(True, "compute documents again in the backward: a batch in the memory of one document")
    max_steps: int = _option(60, "steps of the optimiser")
    learning_rate: float = _option(1e-4, "its highest value")
    warmup_steps: float = _option(0.1, "steps (or a share of them) over which it rises")
    lr_scheduler_type: str = _option("cosine", "how it falls afterwards")
    per_device_train_batch_size: int = _option(16, "documents of a step and device")
    eval_strategy: str = _option("steps", "when to evaluate")
    eval_steps: float | None = _option(0.25, "steps (or share of them) between evaluations")
    save_strategy: str = _option("steps", "when to save a checkpoint")
    save_steps: float = _option(0.25, "steps (or share of them) between checkpoints")
    save_total_limit: int | None = _option(2, "checkpoints to keep, the best one among them")
    logging_steps: float = _option(5, "steps between lines of progress")
    load_best_model_at_end: bool = _option(True, "keep the checkpoint with the best evaluation")
    metric_for_best_model: str | None = _option("mrr", "what is best")
    greater_is_better: bool | None = _option(True, "is more of it better?")

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature must be above 0, got {self.temperature}")
        for name in ("passage_weight", "keep_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        self.remove_unused_columns = False  # the rows hold what a step takes, and nothing else
        self.logging_nan_inf_filter = False  # it would hide that a training has diverged
        check_whole_models(self, "the healing of encoders")
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to copy to


def contrastive_loss(
    queries: Tensor, documents: Tensor, right: Tensor, temperature: float, ignored: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the right document of each query among all: unit vectors [m d], [n d]; right [m] int.

    ignored [m n] bool: documents that are neither right nor wrong. No query: 0. At least fp32.
    """
    scores = (queries @ documents.mT).to(torch.promote_types(queries.dtype, torch.float32)) / temperature
    if ignored is not None:
        own = F.one_hot(right, len(documents)).bool()
        scores = scores.masked_fill(ignored & ~own, -math.inf)
    return F.cross_entropy(scores, right, reduction="sum") / max(len(right), 1)


def pooled(states: Tensor, how: str, valid: Tensor | None = None) -> Tensor:
    """States [b i d] -> unit vectors [b d] in at least fp32: of the mean over valid [b i] tokens, or of the first."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if how == "cls":
        return F.normalize(states[:, 0], dim=-1)
    if valid is None:
        return F.normalize(states.mean(1), dim=-1)
    weight = valid[..., None].to(states.dtype)
    return F.normalize((states * weight).sum(1) / weight.sum(1).clamp_min(1.0), dim=-1)


class EncoderTrainer(Scaled, Trainer):
    """Trainer of a student that is called as `model(input_ids=..., attention_mask=...)` and gives states.

    teacher   reads queries and single passages for the keep term; in eval and without gradients. None: no such term.
    evaluate  gives metrics of the student as it is; replaces the evaluation loop.
    Logs carry the three parts of the loss and the `seconds` of training so far. Diverged, naming the step, where loss
    or gradients are not finite: no checkpoint holds weights from after that.
    """

    def __init__(
        self,
        *,
        student: TextEncoder,
        rows: Rows,
        args: EncoderArguments,
        teacher: TextEncoder | None = None,
        evaluate: Evaluate | None = None,
        **options: Any,
    ) -> None:
        step = args.train_batch_size * args.world_size
        if len(rows) < step:
            raise ValueError(
                f"there are {len(rows)} documents, and a step takes {step}: give more, or a smaller "
                "--per_device_train_batch_size"
            )
        if args.keep_weight and teacher is None:
            raise ValueError("keep_weight needs a teacher; give one, or set it to 0")
        if step < 2:
            raise ValueError("a batch of one document has no wrong answers; take per_device_train_batch_size >= 2")
        options = {"model": student.model, "eval_dataset": rows if evaluate else None, **options}
        super().__init__(args=args, train_dataset=rows, data_collator=collate, **options)
        self.student, self.teacher, self.metrics = student, teacher, evaluate
        self.parts: dict[str, list[float]] = {}
        self.clock = Clock()
        self.add_callback(self.clock)
        self.add_callback(Watch())
        if teacher is not None:
            teacher.model.eval().requires_grad_(False).to(args.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        args: Any = self.args
        documents, passages = self._documents(model, inputs)
        queries = self._short(model, self.student, inputs["query_ids"].split(inputs["query_lengths"].tolist()))
        example, owner, places = inputs["example"], inputs["owner"], inputs["places"]
        same = example[owner][:, None] == example
        parts = {"documents": contrastive_loss(queries, documents, owner, args.temperature, same)}
        loss = parts["documents"]
        if args.passage_weight:
            known = places >= 0
            parts["passages"] = contrastive_loss(queries[known], passages, places[known], args.temperature)
            loss = loss + args.passage_weight * parts["passages"]
        if args.keep_weight:
            parts["keep"] = self._kept(inputs, queries, passages)
            loss = loss + args.keep_weight * parts["keep"]
        if model.training:
            for name, part in parts.items():
                self.parts.setdefault(name, []).append(float(part.detach()))
        return (loss, {}) if return_outputs else loss  # type: ignore[return-value]

    def _documents(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Vectors of the batch's documents [n d] and of its passages [p d]."""
        spans, made, cut = inputs["spans"], list[Tensor](), list[Tensor]()
        for n, ids in enumerate(inputs["input_ids"].split(inputs["lengths"].tolist())):
            mine = spans[spans[:, 0] == n, 1:].tolist()
            if self.args.recompute and torch.is_grad_enabled():  # type: ignore[attr-defined]
                vectors = checkpoint(self._document, model, ids, mine, use_reentrant=False)
            else:
                vectors = self._document(model, ids, mine)
            made.append(vectors[0])
            cut.append(vectors[1:])
        return torch.stack(made), torch.cat(cut)

    def _document(self, model: Any, ids: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
        """[1 + spans, d]: the document's vector and those of its passages."""
        states = model(input_ids=ids[None]).last_hidden_state
        return torch.cat([pooled(states, self.student.pooling), *(pooled(states[:, a:b], "mean") for a, b in spans)])

    def _short(self, model: Any, encoder: TextEncoder, texts: Sequence[Tensor]) -> Tensor:
        """Vectors [m d] of short texts of ids, in batches of similar lengths."""
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
        found: list[Tensor] = [texts[0]] * len(texts)
        while order:
            fit = max(TOKENS // len(texts[order[0]]), 1)
            batch, order = order[:fit], order[fit:]
            ids = pad_sequence([texts[n] for n in batch], batch_first=True)
            lengths = torch.tensor([len(texts[n]) for n in batch], device=ids.device)
            valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            mask = None if bool(valid.all()) else valid.long()
            vectors = pooled(model(input_ids=ids, attention_mask=mask).last_hidden_state, encoder.pooling, valid)
            for n, vector in zip(batch, vectors, strict=True):
                found[n] = vector
        return torch.stack(found)

    def _kept(self, inputs: Any, queries: Tensor, passages: Tensor) -> Tensor:
        """How far queries and passages are from the teacher's, each as a mean."""
        if self.teacher is None:
            raise ValueError("keep_weight needs a teacher")
        documents = inputs["input_ids"].split(inputs["lengths"].tolist())
        front, back = (torch.tensor(x, device=queries.device, dtype=torch.long)
                       for x in (self.teacher.front, self.teacher.back))  # fmt: skip
        alone = [torch.cat([front, documents[n][a:b], back]) for n, a, b in inputs["spans"].tolist()]
        texts = [*inputs["query_ids"].split(inputs["query_lengths"].tolist()), *alone]
        most = self.teacher.model.config.max_position_embeddings
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self._short(self.teacher.model, self.teacher, [text[:most] for text in texts])
        kept = embedding_cosine(queries, wanted[: len(queries)])
        return kept + embedding_cosine(passages, wanted[len(queries) :]) if alone else kept

    def training_step(self, *given: Any, **options: Any) -> Tensor:
        loss = super().training_step(*given, **options)
        if not math.isfinite(float(loss)):
            raise not_finite("the loss", float(loss), self.state, self.args)
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of the function that this trainer was given."""
        if self.metrics is None:
            raise ValueError("this trainer was made without an evaluation; give it `evaluate`")
        model = self.accelerator.unwrap_model(self.model)
        trained = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.metrics().items()}
        model.train(trained)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {f"loss_{name}": sum(values) / len(values) for name, values in self.parts.items()}
            self.parts = {}
        super().log({**logs, "seconds": round(self.clock.seconds, 3)}, start_time)
