"""What Transformers' Trainer lacks for more than one process: data for cut models, checkpoints of every layout.

    class MyTrainer(Scaled, Trainer)

Its arguments carry a `layout` (see `ScalingArguments`); without one all of this is as in Trainer, but for checkpoints
that appear whole or not at all, the scale of fp16 losses in the logs, and SIGTERM, which saves and ends the training.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from ..benchmarking.folder import new_folder
from ..parallel.sequence import SequenceParallel
from .averaging import Averaging
from .faults import Terminate, whole_checkpoint
from .layout import Layout
from .states import NAMES, gather_states, is_cut, match_schedule, read_weights, scatter_states

__all__ = ["Scaled", "cut_model"]


class Overflows(TrainerCallback, ExportableState):
    """Counts the updates that were skipped because fp16 gradients overflowed; the count is kept in checkpoints."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.skipped, self.before = trainer, 0, 1.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.skipped = saved.get("attributes", {}).get("skipped", 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self._scale()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not accelerate's optimizer_step_was_skipped: it is never so with fused optimisers, which skip by themselves
        self.skipped += int(self._scale() < self.before)

    def _scale(self) -> float:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0


class Scaled:
    """Comes before Trainer among the base classes."""

    args: TrainingArguments
    accelerator: Any
    model: Any
    model_wrapped: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    add_callback: Callable[[Any], None]

    def __init__(self, *, args: Any, **options: Any) -> None:
        # Trainer refuses to save what resuming a cut model needs, because it cannot; the methods below can
        asked, args.save_only_model = args.save_only_model, True
        try:
            super().__init__(args=args, **options)  # type: ignore[call-arg]
        finally:
            args.save_only_model = asked
        self.terminate, self.overflows = Terminate(), Overflows(self)
        self.averaging = Averaging(self) if getattr(self.args, "average_every", 1) > 1 else None
        self.sequence = _share_sequence(self.model, self.layout) if self.layout.sequence > 1 else None
        if self.sequence is not None:  # gradients are summed below, not by DistributedDataParallel
            self.is_distributed_loading_by_transformers = True
        for callback in filter(None, (self.terminate, self.overflows, self.averaging)):
            self.add_callback(callback)

    @property
    def layout(self) -> Layout:
        found = getattr(self.args, "layout", None)
        return Layout(replicas=self.args.world_size, rank=self.args.process_index) if found is None else found

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of them, that work on rows of their own."""
        return self.args.world_size if self.layout.plain else self.layout.data_ranks

    @property
    def data_rank(self) -> int:
        return self.args.process_index if self.layout.plain else self.layout.data_rank

    def train(self, *given: Any, **options: Any) -> Any:
        """As Trainer's. Stopped by SIGTERM, it returns early, with a checkpoint saved and `terminate.stopped` True."""
        with self.terminate.listening():
            return super().train(*given, **options)  # type: ignore[misc]

    def _build_accelerator_args(self, **given: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**given)  # type: ignore[misc]
        if self.layout.distributed_config() is not None:
            # a model that is cut already: accelerate need not know, and on a CPU refuses to
            built.pop("parallelism_config", None)
        return built

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if not self.layout.plain:
            self.accelerator.prepare_data_loader = partial(self._share_rows, self.accelerator)
            self.accelerator.gather_for_metrics = self._gather_rows

    def _share_rows(self, accelerator: Any, loader: Any, *given: Any, **options: Any) -> Any:
        """As accelerate's, but processes that work on the same rows are given the same rows."""
        if not getattr(loader, "_is_accelerate_prepared", False):
            loader = prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=self.data_ranks,
                process_index=self.data_rank,
                put_on_device=accelerator.device_placement,
                rng_types=accelerator.rng_types.copy(),
                even_batches=accelerator.even_batches,
                use_seedable_sampler=accelerator.use_seedable_sampler,
                data_seed=accelerator.dataloader_config.data_seed,
                non_blocking=accelerator.non_blocking,
            )
        accelerator._dataloaders.append(loader)
        return loader

    def _gather_rows(self, data: Any) -> Any:
        """As accelerate's, of rows that several processes have worked on one copy each."""
        world, ends = self.args.world_size, self.accelerator.gradient_state
        copies = world // self.data_ranks
        left = ends.remainder if ends.end_of_dataloader and ends.remainder > 0 else None

        def once(x: Tensor) -> Tensor:
            return x.unflatten(0, (world, len(x) // world))[::copies].flatten(0, 1)[:left]

        return recursively_apply(once, self.accelerator.gather(data))

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        if self.sequence is None:
            super()._sync_replicated_trainable_parameters(model)  # type: ignore[misc]

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """While it lasts the model takes whole rows, shared or not."""
        if self.sequence is not None:
            self.sequence.pause()
        try:
            yield
        finally:
            if self.sequence is not None:
                self.sequence.resume()

    def batch_loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch, however it is shared."""
        return model(**batch).loss if self.sequence is None else self.sequence.loss(batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.sequence is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if return_outputs:
            raise ValueError("outputs of a shared sequence are slices, which nothing here puts together")
        if num_items_in_batch is None:
            return self.sequence.loss(inputs)
        # every process counted whole rows, of which `sequence` processes hold a slice each
        items = num_items_in_batch / self.layout.sequence
        return self.sequence.loss(inputs, items) * self.data_ranks

    def training_step(self, *given: Any, **options: Any) -> Tensor:
        """As Trainer's; where rows are shared, the last one of an update also sums gradients over the processes."""
        loss = super().training_step(*given, **options)  # type: ignore[misc]
        if self.sequence is not None and self.accelerator.sync_gradients:
            self.sequence.reduce_gradients()
            if self.data_ranks > 1:
                for p in self.model.parameters():
                    if p.grad is not None:
                        dist.all_reduce(p.grad)
                        p.grad /= self.args.world_size
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        if not self.layout.plain:  # it has counted rows once for every process that works on them
            new = self.state.num_input_tokens_seen - before
            self.state.num_input_tokens_seen = before + new * self.data_ranks // self.args.world_size

    def _run_epoch(self, *given: Any, **options: Any) -> None:
        """As Trainer's, which takes one step too many where it resumes from the checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # type: ignore[attr-defined]
        else:
            super()._run_epoch(*given, **options)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with whole_checkpoint(self, trial) as folder:
            self._folder = folder
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                del self._folder

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_folder", None) or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine_saves():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        states = gather_states(_inner(self.optimizer), self.model, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(states, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", OPTIMIZER_NAME)
        if checkpoint is None or self._engine_saves() or not file.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        saved = torch.load(file, map_location="cpu", weights_only=True)
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        optimizer = _inner(self.optimizer)
        if NAMES not in saved:
            if is_cut(self.model):
                raise ValueError(
                    f"{file} does not name its parameters, so it cannot be cut over processes; resume in one"
                )
            optimizer.load_state_dict(saved)
        else:
            optimizer.load_state_dict(scatter_states(saved, optimizer, self.model))
            schedule = match_schedule(schedule, saved, optimizer, self.model)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = self.model if model is None else model
        if self._engine_saves() or not is_cut(whole):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            read_weights(Path(resume_from_checkpoint), whole)

    def _load_best_model(self) -> None:
        if self._engine_saves() or not is_cut(self.model):
            super()._load_best_model()  # type: ignore[misc]
        else:
            read_weights(Path(self.state.best_model_checkpoint), self.model)

    def save_whole(self, folder: Path, *also: Any) -> None:
        """The whole model in a folder as `from_pretrained` reads it, however it is cut; `also` what else has a
        `save_pretrained`, tokenizers say. Every process takes part, the first one writes."""
        cut, state = is_cut(self.model), self._whole_state()
        if self.args.process_index == 0:
            with new_folder(folder, overwrite=True, mark="config.json") as working:
                self.model.save_pretrained(working, state_dict=state)
                for one in also:
                    one.save_pretrained(working)
        elif cut:
            with tempfile.TemporaryDirectory() as nowhere:  # it sends its parts and writes nothing
                self.model.save_pretrained(nowhere, is_main_process=False)

    def _whole_state(self) -> dict[str, Tensor] | None:
        """For `save_pretrained`; None where that gathers by itself."""
        return None if is_cut(self.model) else self.accelerator.get_state_dict(self.model_wrapped)

    def _engine_saves(self) -> bool:
        """DeepSpeed, and FSDP by accelerate, have files of their own."""
        return bool(getattr(self, "is_deepspeed_enabled", False) or getattr(self, "is_fsdp_enabled", False))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; with fp16 also `loss_scale` (halved by an overflow, doubled after many good steps) and
        `skipped_steps` so far; with averaging how far the processes were apart."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            logs = {**logs, "loss_scale": scaler.get_scale(), "skipped_steps": self.overflows.skipped}
        if self.averaging is not None and self.averaging.drift is not None:
            logs = {**logs, "drift": self.averaging.drift}
        super().log(logs, start_time)  # type: ignore[misc]


def _share_sequence(model: Any, layout: Layout) -> SequenceParallel:
    """Every `sequence` neighbours are a group; all processes take part in making all groups."""
    world = layout.sequence * layout.data_ranks
    groups = [dist.new_group(list(range(n, n + layout.sequence))) for n in range(0, world, layout.sequence)]
    return SequenceParallel(model, groups[layout.data_rank])


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def cut_model(model: PreTrainedModel, layout: Layout, folder: Path, local_rank: int) -> PreTrainedModel:
    """The model itself, or its like with weights cut over the processes as the layout says.

    It goes through a file, once a machine, because Transformers cuts while loading. `folder` is for that file.
    """
    config = layout.distributed_config()
    if config is None:
        return model
    if layout.data_ranks > 1 and (stacks := _unplanned_stacks(model)):
        config.fsdp_plan = dict.fromkeys(stacks, "free_full_weight")
    if local_rank == 0:
        # by itself it writes on the first process of all machines alone, and every machine reads a file of its own
        vars(model)["should_save_on_this_rank"] = lambda first: first
        try:
            model.save_pretrained(folder)
        finally:
            del vars(model)["should_save_on_this_rank"]
    dist.barrier()
    cut = type(model).from_pretrained(folder, distributed_config=config)
    dist.barrier()
    if local_rank == 0:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return cut


def _unplanned_stacks(model: PreTrainedModel) -> list[str]:
    """Stacks of layers that the family's plan for FSDP2 leaves out, BERT's for one, which calls them other names: the
    whole model would be one part, gathered at once."""
    layers = (name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer))
    return sorted({replace_layer_number_by_wildcard(name) for name in layers} - set(model.fsdp_plan))
