"""Pipeline parallelism for TFast models: every process holds some of the layers, micro-batches flow through them.

    pipeline = Pipeline(model, group)            # the same whole model on all processes; each keeps its own layers
    optimizer = AdamW(pipeline.parameters())
    loss = pipeline.step(batch)                  # forward and backward of all micro-batches; the loss on all processes
    pipeline.clip(1.0)
    optimizer.step(), optimizer.zero_grad()
    state = pipeline.state_dict()                # the whole model's, on the first process

torch.distributed.pipelining runs the schedule: 1F1B (Narayanan et al., "PipeDream", https://arxiv.org/abs/1806.03377),
or, where a process has several stages, interleaved 1F1B (Narayanan et al., https://arxiv.org/abs/2104.04473, section
2.2). Loss and gradients are those of one process. Attention is within a layer, so every mechanism runs; word
embeddings that are tied to the output layer live on the first and the last process, which sum their gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn import functional as F  # noqa: N812

from ..models.modeling_tfast import TFastForCausalLM, TFastForMaskedLM
from .pipeline_stage import Stage, cut_layers, keep_stages
from .sequence import IGNORED, token_loss

__all__ = ["Pipeline"]

TAKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "labels")


class Pipeline:
    """The stages of `model` that this process of `group` holds; the others are taken out of it.

    stages        per process; above 1 the schedule is interleaved: process n of p holds stages n, n + p, n + 2 p, ...
    microbatches  into how many parts the rows of a batch are cut; None: one for every stage.
    Raises        ValueError for models other than TFastForCausalLM and TFastForMaskedLM, for more stages than layers,
                  and for batches whose rows do not divide over the micro-batches.
    """

    def __init__(self, model: Any, group: Any = None, *, stages: int = 1, microbatches: int | None = None) -> None:
        if not isinstance(model, TFastForCausalLM | TFastForMaskedLM):
            raise ValueError(
                f"a pipeline is cut from TFastForCausalLM or TFastForMaskedLM, got {type(model).__name__}; "
                "Transformers' own models run in stages by DistributedConfig(pp_size=...), forward only"
            )
        if not dist.is_initialized():
            raise ValueError("a pipeline needs a process group: start the script with torchrun or accelerate launch")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranks = dist.get_process_group_ranks(self.group)
        self.count = self.size * stages
        self.microbatches = self.count if microbatches is None else microbatches
        if self.microbatches < self.size:
            raise ValueError(f"{self.size} processes need at least as many micro-batches, got {self.microbatches}")
        self.device = next(model.parameters()).device
        self.model, self.causal = model, isinstance(model, TFastForCausalLM)
        self.vocabulary, self.width = model.config.vocab_size, model.config.hidden_size
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        mine = range(self.rank, self.count, self.size)
        cuts = cut_layers(model.config.num_hidden_layers, self.count)
        self.stages = [Stage(model, cuts[n], first=n == 0, last=n == self.count - 1) for n in mine]
        keep_stages(model, self.stages)
        self.numbers = list(mine)
        self.ends: Any = None
        if tied and self.size > 1:  # every process takes part in making the group
            ends = [self.ranks[0], self.ranks[-1]]
            self.ends = dist.new_group(ends, use_local_synchronization=True) if dist.get_rank() in ends else None
        self.tied = tied and self.size > 1
        self._schedules: dict[tuple[int, ...], Any] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this process."""
        return self.model.parameters()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def step(self, batch: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a whole batch, which every process is given; gradients are added to `grad`.

        -> the sum of losses over all labels, divided by their number or by `num_items`, on every process.
        """
        rows, labels = self._rows(batch)
        if labels is None:
            raise ValueError("there are no labels in the batch, so there is nothing to train on")
        count = (labels != IGNORED).sum() if num_items is None else torch.as_tensor(num_items, device=self.device)
        self._divide_by = count.double()
        losses: list[Tensor] = []
        schedule = self._schedule(rows)
        before = None if not self.tied else self._take_tied()
        inputs = (rows.pop("input_ids"),) if self.is_first else ()
        rows.pop("input_ids", None)
        target = {"target": labels, "losses": losses} if self.is_last else {}
        schedule.step(*inputs, **target, **rows, return_outputs=False)
        if self.tied:
            self._sum_tied(before)
        loss = torch.stack(losses).sum().detach().double() if losses else torch.zeros((), dtype=torch.float64)
        loss = loss.to(self.device)
        dist.broadcast(loss, self.ranks[-1], self.group)
        return loss.to(torch.promote_types(next(self.parameters()).dtype, torch.float32))

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> Tensor:
        """[b i vocabulary], on every process: one pass through the stages, without micro-batches."""
        rows, _ = self._rows(batch, cut=False)
        ids = rows.pop("input_ids")
        x, shape = ids, (*ids.shape, self.width)
        dtype = next(self.parameters()).dtype
        for number in range(self.count):
            owner = number % self.size
            if owner == self.rank:
                if number and self.size > 1:
                    x = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(x, self.ranks[(number - 1) % self.size], self.group)
                x = self.stages[self.numbers.index(number)](x, **rows)
                if number < self.count - 1 and self.size > 1:
                    dist.send(x.contiguous(), self.ranks[(number + 1) % self.size], self.group)
        if not self.is_last:
            x = torch.empty(*ids.shape, self.vocabulary, dtype=dtype, device=self.device)
        x = x.contiguous()
        dist.broadcast(x, self.ranks[-1], self.group)
        return x

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Greedy continuation [b i + new] of input_ids [b i] without padding, the same on every process.

        Every token passes through all stages, and every new one reads the whole text again: for samples in training.
        Load the saved model in one process for generation with a cache.
        """
        if not self.causal:
            raise ValueError("a bidirectional model continues nothing")
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            new = self.logits({"input_ids": input_ids})[:, -1].argmax(-1)
            if eos_token_id is not None:
                new = new.masked_fill(done, eos_token_id)
                done |= new == eos_token_id
            input_ids = torch.cat([input_ids, new[:, None]], 1)
            if eos_token_id is not None and bool(done.all()):
                break
        return input_ids

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """The norm of all gradients of all processes, which are scaled down to `most` where it is larger."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        twice = self.model.lm_head.weight.grad if self.tied and self.is_last else None
        squares = sum((g.double().square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
        if twice is not None:  # the tied weight counts once, as in one process
            squares = squares - twice.double().square().sum()
        squares = squares.to(self.device)
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(scale.to(g.dtype))
        return norm

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's on the first process, on the CPU; None on the others. Every process calls it."""
        mine = {name: x.detach().cpu() for name, x in self.model.state_dict().items()}
        every: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(mine, every, self.ranks[0], self.group)
        if every is None:
            return None
        merged: dict[str, Tensor] = {}
        for part in every:
            merged |= {name: x for name, x in part.items() if name not in merged}
        if self.tied:
            merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
        return merged

    def _rows(self, batch: dict[str, Any], cut: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the stages take of a batch, and the labels, shifted in causal models."""
        if unknown := [name for name in batch if name not in TAKEN]:
            raise ValueError(f"the stages of a pipeline do not take {unknown[0]!r}; they take {', '.join(TAKEN)}")
        rows = {name: x for name, x in batch.items() if name != "labels"}
        n = len(rows["input_ids"])
        if cut and n % self.microbatches:
            raise ValueError(
                f"{n} rows cannot be cut evenly into {self.microbatches} micro-batches: give a multiple of "
                f"{self.microbatches} rows, or other microbatches (at least {self.size})"
            )
        if "position_ids" in rows:
            rows["position_ids"] = rows["position_ids"].expand(n, -1)
        labels = batch.get("labels")
        if labels is not None and self.causal:
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
        return rows, labels

    def _schedule(self, rows: dict[str, Tensor]) -> Any:
        """The schedule for batches of this shape, which the stages settle when it is made."""
        n, length = rows["input_ids"].shape
        if (n, length) not in self._schedules:
            part = n // self.microbatches
            made: list[Any] = []
            for number, stage in zip(self.numbers, self.stages, strict=True):
                states = torch.empty(part, length, self.width, dtype=next(self.parameters()).dtype, device="meta")
                ids = torch.empty(part, length, dtype=torch.int64, device="meta")
                logits = torch.empty(part, length, self.vocabulary, dtype=states.dtype, device="meta")
                inside, logits = states.requires_grad_(), logits.requires_grad_()
                made.append(
                    PipelineStage(
                        stage,
                        number,
                        self.count,
                        self.device,
                        input_args=(ids if stage.first else inside,),
                        output_args=(logits if stage.last else inside,),
                        group=self.group,
                    )
                )
            options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
            if len(made) == 1:
                self._schedules[n, length] = Schedule1F1B(made[0], self.microbatches, **options)
            else:
                self._schedules[n, length] = ScheduleInterleaved1F1B(made, self.microbatches, **options)
        return self._schedules[n, length]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_loss(logits, labels) / self._divide_by

    def _tied_weight(self) -> nn.Parameter | None:
        if self.is_first:
            return self.model.model.embed_tokens.weight
        return self.model.lm_head.weight if self.is_last else None

    def _take_tied(self) -> Tensor | None:
        """Gradients of earlier batches are summed already."""
        weight = self._tied_weight()
        before, grad = None, None if weight is None else weight.grad
        if weight is not None and grad is not None:
            before, weight.grad = grad, None
        return before

    def _sum_tied(self, before: Tensor | None) -> None:
        weight = self._tied_weight()
        if weight is None:
            return
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        dist.all_reduce(weight.grad, group=self.ends)
        if before is not None:
            weight.grad += before
