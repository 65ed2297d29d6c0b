"""The options with which a training grows: how processes share it, and how seldom they may agree."""

import os
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import str_to_bool

from .layout import Layout

__all__ = ["ScalingArguments", "check_whole_models"]


def _size(text: str, default: int = 1) -> int:
    value: int = field(default=default, metadata={"help": text})
    return value


@dataclass
class ScalingArguments:
    """Mixed into TrainingArguments. When `share` has been called, `layout` says which process does what."""

    tensor_parallel: int = _size("processes that share every layer (heads and feed-forward width are cut)")
    shard: int = _size("processes that share all weights, gradients and states of the optimiser (FSDP2)")
    replicas: int = _size("groups of such processes, with whole weights between them (hybrid sharding)")
    sequence_parallel: int = _size("processes that share every row of tokens")
    pipeline_parallel: int = _size("processes that hold some of the layers each; every row is a micro-batch")
    pipeline_stages: int = _size("stages of each such process; above 1 they are interleaved")
    average_every: int = _size("steps that data-parallel processes take alone before they average their weights")
    average_delay: int = _size("steps that such an average may be under way while the processes go on", 0)

    def share(self) -> None:
        """Settle the layout, before TrainingArguments settles the device. ValueError for what does not fit."""
        self.layout = Layout.of(self)
        self.layout.claim()
        if self.pipeline_stages < 1 or (self.pipeline_stages > 1 and self.layout.pipeline == 1):
            raise ValueError(
                f"pipeline_stages are stages of each process of a pipeline, got {self.pipeline_stages} for "
                f"{self.layout.pipeline} processes: ask for --pipeline_parallel too"
            )
        if self.average_every < 1 or self.average_delay < 0:
            raise ValueError(
                f"average_every must be at least 1 and average_delay at least 0, got {self.average_every} and "
                f"{self.average_delay}"
            )
        if self.average_delay >= self.average_every > 1 or self.average_delay and self.average_every == 1:
            raise ValueError(
                f"an average that takes {self.average_delay} steps must be done before the next begins: give "
                f"--average_every more than {self.average_delay} (and at least 2), got {self.average_every}"
            )
        if self.average_every > 1 and not self.layout.plain:
            raise ValueError(
                f"averaging every {self.average_every} steps needs whole models in every process, and the layout is "
                f"{self.layout}: leave one out"
            )


def check_whole_models(arguments: Any, what: str) -> None:
    """ValueError where flags or launcher ask `what` for more than data parallelism. For trainings that hold several
    models, or call parts of one, which engines that cut weights cannot follow."""
    layout = getattr(arguments, "layout", None) or Layout.of(arguments)
    if not layout.plain:
        raise ValueError(
            f"{what} trains whole models, data parallel, and the layout is {layout}: launch it with "
            "recipes/accelerate/ddp.yaml; pretrain_clm.py, pretrain_mlm.py and the recipes of tasks take layouts"
        )
    engines = {"DeepSpeed": "deepspeed", "FSDP": "fsdp", "Megatron-LM": "megatron_lm"}
    for engine, option in engines.items():
        asked = str_to_bool(os.environ.get(f"ACCELERATE_USE_{option.upper()}") or "false")
        if getattr(arguments, option, None) or (asked and engine != "FSDP"):  # FSDP of one process is none
            raise ValueError(
                f"{what} trains whole models, data parallel, and {engine} cuts or wraps them: leave --{option} out, "
                "or launch it with recipes/accelerate/ddp.yaml"
            )
    if getattr(arguments, "average_every", 1) > 1:
        raise ValueError(f"{what} averages in every step: leave --average_every out")
