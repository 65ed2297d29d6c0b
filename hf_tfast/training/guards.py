"""What accelerate would silently do differently on a CPU is refused before anything is trained.

Found with accelerate 1.15: on a CPU it drops fp16 and trains in fp32, and ignores an FSDP plugin and trains plain data
parallel. `accelerate launch --cpu --num_processes 2` starts one process unless MPI starts the others, and processes
that torchrun started train each alone unless they are told to use the CPU.
"""

import os
from collections.abc import Mapping
from typing import Any

from accelerate.utils import str_to_bool

from .launch import check_optimiser_reach, check_ranks
from .layout import Layout

__all__ = ["check_launch"]

_TORCHRUN = "Several processes on a CPU: `torchrun --nproc_per_node 2 recipes/... --use_cpu true`"


def check_launch(arguments: Any, environment: Mapping[str, str] | None = None) -> None:
    """ValueError where the launch asks for something that this device does not do.

    arguments    TrainingArguments, whose device and processes accelerate has settled.
    environment  os.environ, where `accelerate launch` and torchrun leave their settings.
    """
    given = os.environ if environment is None else environment
    asked, running = _processes(given), int(arguments.world_size)
    if asked is None:
        raise ValueError(
            "accelerate was asked for several processes and started one: on a CPU it needs MPI for more "
            f"(--mpirun_hostfile). {_TORCHRUN}"
        )
    if asked != running:
        raise ValueError(f"the launcher started {asked} processes, but accelerate sees {running}. {_TORCHRUN}")
    check_ranks(arguments)
    layout = getattr(arguments, "layout", None) or Layout()
    check_optimiser_reach(arguments, layout)
    if not layout.plain and getattr(arguments, "fsdp", None):
        raise ValueError(f"--fsdp is accelerate's own sharding, and the layout ({layout}) has one: leave it out")
    if arguments.device.type != "cpu":
        return
    if layout.offload:
        raise ValueError(
            "offloading shards to CPU memory on a CPU moves nothing, and its copies need a GPU: take "
            "recipes/accelerate/fsdp2.yaml instead"
        )
    if arguments.fp16 or given.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise ValueError(
            "fp16 on a CPU: accelerate would train in fp32 without a word; use bf16 (--bf16 with --use_cpu, or "
            "`accelerate launch --cpu --mixed_precision bf16`) or no mixed precision"
        )
    if getattr(arguments, "fsdp", None) or _on(given, "ACCELERATE_USE_FSDP"):
        raise ValueError(
            "FSDP on a CPU: accelerate ignores it and trains plain data parallel; shard with --shard N, which "
            "Transformers' DistributedConfig does, or leave it out"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _on(given, f"ACCELERATE_USE_{name}"):
            raise ValueError(f"{name.lower()} needs GPUs; choose no distributed plugin for a launch on a CPU")


def _processes(given: Mapping[str, str]) -> int | None:
    """How many processes there are by the launcher's word; None: more were asked for than it started."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if given.get(name):
            return int(given[name])
    # `accelerate launch --cpu` sets an address to meet at only where several processes were asked for
    return None if _on(given, "ACCELERATE_USE_CPU") and "MASTER_ADDR" in given else 1


def _on(given: Mapping[str, str], name: str) -> bool:
    return bool(str_to_bool(given.get(name, "false") or "false"))
