"""The trainer of a pipeline: every process trains the layers that it holds, checkpoints hold the whole model.

`--pipeline_parallel N` takes N neighbouring processes as one pipeline (replicas of it see rows of their own), every
row of a batch is a micro-batch, and `--pipeline_stages` above 1 interleaves stages. Checkpoints are those of one
process: any layout goes on from them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..benchmarking.memory import peak_memory
from ..parallel.pipeline import Pipeline
from .packing import collate
from .states import NAMES, gather_states, scatter_states
from .trainer import PretrainingTrainer, not_finite

__all__ = ["PipelineTrainer"]

TIED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class PipelineTrainer(PretrainingTrainer):
    """As PretrainingTrainer, of a whole model that is cut here, in place. ValueError where rows are fewer than the
    processes of a pipeline, and for fp16, whose scaler would have to skip steps on all processes at once."""

    def __init__(self, *, model: Any, args: Any, **options: Any) -> None:
        size = args.layout.pipeline
        if args.fp16:
            raise ValueError("a pipeline is trained in bf16 or fp32, not in fp16")
        if args.train_batch_size < size:
            raise ValueError(
                f"every row is a micro-batch, and a pipeline of {size} processes needs {size} of them: raise "
                f"--per_device_train_batch_size to {size} at least, got {args.train_batch_size}"
            )
        world = args.world_size
        groups = [dist.new_group(list(range(n, n + size))) for n in range(0, world, size)]
        alike = [dist.new_group(list(range(n, world, size))) for n in range(size)]  # the same stages of all replicas
        self.pipeline = Pipeline(
            model, groups[args.layout.data_rank], stages=args.pipeline_stages, microbatches=args.train_batch_size
        )
        self.alike = alike[self.pipeline.rank]
        super().__init__(model=model, args=args, **options)
        self.is_distributed_loading_by_transformers = True  # no DistributedDataParallel: processes differ

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Nothing: all processes have drawn the same model and keep parts of it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        items = num_items_in_batch
        if items is None:
            raise ValueError("the batch has no labels to count, so the loss of a pipeline has no scale")
        items = items / self.pipeline.size  # every process of the pipeline has counted the same rows
        with self.compute_loss_context_manager():
            loss = self.pipeline.step(batch, items) * self.data_ranks
        if self.accelerator.sync_gradients and self.data_ranks > 1:
            for p in self.pipeline.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad, group=self.alike)
        if not math.isfinite(float(loss)):
            raise not_finite("the loss", float(loss), self.state, self.args)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.pipeline.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return float(self.pipeline.clip(math.inf) if grad_norm is None else grad_norm)

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        mine, self.model = self.model, _Whole(self.pipeline)
        try:
            yield
        finally:
            self.model = mine

    def step_memory(self) -> int:
        rows = [self.train_dataset[n] for n in range(self.args.train_batch_size)]  # type: ignore[index]
        batch = {name: x.to(self.args.device) for name, x in collate(rows).items()}

        def step() -> None:
            with self.compute_loss_context_manager():
                self.pipeline.step(batch)

        step()
        self.model.zero_grad()
        peak = peak_memory(step, self.args.device)
        self.model.zero_grad()
        return peak.bytes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = self.pipeline.state_dict()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _whole_state(self) -> dict[str, Tensor] | None:
        return self.pipeline.state_dict()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        mine = gather_states(_inner(self.optimizer), self.model, keep=True)
        pipeline = self.pipeline
        every: list[Any] | None = [None] * pipeline.size if pipeline.is_first else None
        dist.gather_object(mine, every, pipeline.ranks[0], pipeline.group)
        if self.args.should_save and every is not None:
            torch.save(_merged(every, pipeline.tied), Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", OPTIMIZER_NAME)
        if checkpoint is None or not file.is_file():
            return
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if NAMES not in saved:
            raise ValueError(f"{file} does not name its parameters, so it cannot be cut into stages; resume in one")
        optimizer = _inner(self.optimizer)
        optimizer.load_state_dict(scatter_states(_own(saved, self.model), optimizer, self.model))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        weights.setdefault(OUTPUT, weights.get(TIED, torch.empty(0)))
        for name, p in self.model.named_parameters():
            if name not in weights:
                raise ValueError(f"{folder} has no weights for {name}")
            p.copy_(weights[name])


class _Whole:
    """The model that an evaluation meets: logits through all stages."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.training = pipeline.model.training

    def eval(self) -> None:
        self.pipeline.model.eval()

    def train(self, mode: bool = True) -> None:
        self.pipeline.model.train(mode)

    def parameters(self) -> Iterator[Any]:
        return self.pipeline.parameters()

    def __call__(self, use_cache: bool = False, **batch: Tensor) -> Any:
        return SimpleNamespace(logits=self.pipeline.logits(batch))


def _merged(parts: list[dict[str, Any]], tied: bool) -> dict[str, Any]:
    """The optimisers' states of all stages as those of one process."""
    names: list[str] = []
    state, groups = {}, []
    for number, first in enumerate(parts[0]["param_groups"]):
        start = len(names)
        for part in parts:
            for n in part["param_groups"][number]["params"]:
                name = part[NAMES][n]
                if tied and name == OUTPUT:  # one process has it under the name of the embeddings
                    continue
                if n in part["state"]:
                    state[len(names)] = part["state"][n]
                names.append(name)
        groups.append({**first, "params": list(range(start, len(names)))})
    return {"state": state, "param_groups": groups, NAMES: names}


def _own(saved: dict[str, Any], model: Any) -> dict[str, Any]:
    """Of the states of one process those of this model's parameters."""
    mine = {name for name, _ in model.named_parameters()}
    names: list[str] = []
    state, groups = {}, []
    for group in saved["param_groups"]:
        start = len(names)
        for n in group["params"]:
            called = [saved[NAMES][n]]
            if called[0] == TIED and OUTPUT not in saved[NAMES]:
                called.append(OUTPUT)
            for name in called:
                if name in mine:
                    if n in saved["state"]:
                        state[len(names)] = saved["state"][n]
                    names.append(name)
        groups.append({**group, "params": list(range(start, len(names)))})
    return {"state": state, "param_groups": groups, NAMES: names}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
