"""How the processes of a launch share a training: which cut the layers, which the weights, which the data.

`accelerate launch --config_file recipes/accelerate/<name>.yaml` hands its settings to the script in the environment.
`Layout.of` reads them there (or from the flags of the recipe), and the trainer runs them by Transformers'
DistributedConfig, on CPUs (gloo) and GPUs (nccl) alike: accelerate itself has no sharding on a CPU, and would ignore
the request without a word. So the layout is claimed: what is read here is switched off there.

    tensor     processes that hold a part of every layer each and work on the same rows
    shard      processes that hold a part of all weights each and work on rows of their own (FSDP2)
    replicas   groups of these, with whole weights between them (hybrid sharding; with shard 1, data parallel)
    sequence   processes that hold a part of every row each
    pipeline   processes that hold some of the layers each

Tensor is the innermost: with 8 GPUs a machine, tensor=8 stays within one. Plain data parallel has none of these, and
is accelerate's own.
"""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from accelerate.utils import str_to_bool
from transformers.distributed import DistributedConfig

__all__ = ["Layout"]

FLAGS = {"tensor": "tensor_parallel", "shard": "shard", "replicas": "replicas",
         "sequence": "sequence_parallel", "pipeline": "pipeline_parallel"}  # fmt: skip
VARIABLES = {"tensor": "TP_SIZE", "shard": "DP_SHARD_SIZE", "replicas": "DP_REPLICATE_SIZE", "sequence": "SP_SIZE"}
# What accelerate's FSDP can be told and this cannot; the first value is what is meant here.
FIXED = {
    "FSDP_VERSION": ("2",),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes whose product is the number of processes, replicas filled up; `offload`: shards rest in CPU memory."""

    tensor: int = 1
    shard: int = 1
    replicas: int = 1
    sequence: int = 1
    pipeline: int = 1
    offload: bool = False
    rank: int = 0

    @classmethod
    def of(cls, arguments: Any, environment: MutableMapping[str, str] | None = None) -> "Layout":
        """What flags and launcher ask for together. ValueError where they contradict each other or the processes."""
        given = os.environ if environment is None else environment
        world, rank = int(given.get("WORLD_SIZE") or 1), int(given.get("RANK") or 0)
        asked = _of_launcher(given)
        for size, flag in FLAGS.items():
            mine = getattr(arguments, flag, 1)
            if mine < 1:
                raise ValueError(f"--{flag} must be at least 1, got {mine}")
            if mine > 1 and asked.setdefault(size, mine) != mine:
                raise ValueError(
                    f"--{flag} {mine}, but the configuration of accelerate launch says {asked[size]}: leave one out"
                )
        offload = bool(asked.pop("offload", 0))
        full = asked.pop("full", 0) and "shard" not in asked  # a flag says how many
        sizes = dict.fromkeys(FLAGS, 1) | asked
        _fill(sizes, world, bool(full))
        layout = cls(**sizes, offload=offload, rank=rank)
        if offload and layout.shard == 1:
            raise ValueError(
                "offloading to CPU memory belongs to shards: ask for --shard N, or FSDP in the configuration"
            )
        if layout.tensor * layout.shard > 1 and layout.sequence * layout.pipeline > 1:
            raise ValueError(
                f"{layout}: a shared sequence and a pipeline need whole weights in every process; combine them with "
                "--replicas (data parallel) only"
            )
        return layout

    def claim(self, environment: MutableMapping[str, str] | None = None) -> None:
        """Tell accelerate that none of it is its own business."""
        given = os.environ if environment is None else environment
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
            if name in given:
                given[name] = "false"

    @property
    def plain(self) -> bool:
        """One process, or data parallel alone."""
        return self.tensor == self.shard == self.sequence == self.pipeline == 1

    @property
    def data_ranks(self) -> int:
        """Groups of processes that work on rows of their own."""
        return self.shard * self.replicas

    @property
    def data_rank(self) -> int:
        """Which of them this process belongs to."""
        return self.rank // (self.tensor * self.sequence * self.pipeline)

    def distributed_config(self) -> DistributedConfig | None:
        """For `from_pretrained`; None where whole models are trained."""
        if self.tensor == self.shard == 1:
            return None
        return DistributedConfig(
            tp_size=self.tensor,
            fsdp_size=self.shard,
            dp_replicate_size=self.replicas,
            fsdp_cpu_offload=self.offload,
        )

    def __str__(self) -> str:
        named = [f"{name} {getattr(self, name)}" for name in FLAGS if getattr(self, name) > 1]
        return ", ".join([*named, *(["offload"] if self.offload else [])]) or "one process"


def _of_launcher(given: MutableMapping[str, str]) -> dict[str, int]:
    """Sizes above 1 in the environment; with "full" where FSDP shards over all processes that are left."""
    asked = {}
    if _on(given, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for size, name in VARIABLES.items():
            value = int(given.get(f"PARALLELISM_CONFIG_{name}") or 1)
            if value > 1:
                asked[size] = value
        if int(given.get("PARALLELISM_CONFIG_CP_SIZE") or 1) > 1:
            raise ValueError(
                "parallelism_config_cp_size: context parallel gives right numbers with Transformers' sdpa only, and "
                "wrong ones with fast attention; use parallelism_config_sp_size (recipes/accelerate/"
                "sequence_parallel.yaml), which exchanges what the mechanisms read"
            )
    if not _on(given, "ACCELERATE_USE_FSDP"):
        if "shard" in asked or asked.get("replicas", 1) > 1 and "tensor" not in asked:
            raise ValueError(
                "the configuration of accelerate launch shards weights, but its distributed_type is not FSDP: copy "
                "recipes/accelerate/fsdp2.yaml or fsdp2_hybrid.yaml"
            )
        return asked
    for name, allowed in FIXED.items():
        told = given.get(name, allowed[0])
        if told.lower() not in {one.lower() for one in allowed}:
            raise ValueError(
                f"{name.lower()}: {told} is not supported here, only {allowed[0]}{_INSTEAD.get(name, '')}"
            )
    if _on(given, "FSDP_OFFLOAD_PARAMS"):
        asked["offload"] = 1
    if "shard" not in asked:
        asked["full"] = 1
    return asked


_INSTEAD = {
    "FSDP_VERSION": "; see recipes/accelerate/fsdp2.yaml",
    "FSDP_ACTIVATION_CHECKPOINTING": "; use --gradient_checkpointing true",
}


def _fill(sizes: dict[str, int], world: int, full: bool) -> None:
    """Give the processes that nobody asked for to `shard` (FSDP) or to `replicas` (data parallel)."""
    product = 1
    for name, size in sizes.items():
        product *= size if not (full and name == "shard") else 1
    if product > world or world % product:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{named} needs a multiple of {product} processes, and the launcher started {world}: change "
            "num_processes in the configuration (or --nproc_per_node of torchrun), or these sizes"
        )
    left = world // product
    if full:
        sizes["shard"] = left
    elif left > 1:
        if sizes["replicas"] > 1:
            raise ValueError(
                f"the sizes of the configuration multiply to {product}, and the launcher started {world} processes"
            )
        sizes["replicas"] = left


def _on(given: MutableMapping[str, str], name: str) -> bool:
    return bool(str_to_bool(given.get(name, "false") or "false"))
