"""What must agree before processes train together: versions, settings, the model's sizes, the optimiser's reach."""

import dataclasses
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .layout import Layout

__all__ = ["check_optimiser_reach", "check_ranks", "check_sizes"]

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
OWN = {"local_rank", "logging_dir", "run_name", "output_dir", "_n_gpu"}  # settings that may differ between processes


def check_ranks(arguments: Any) -> None:
    """ValueError, in every process, where processes run other versions, other code or other settings than the first.

    Different versions train without an error, to weights that nobody can make again.
    """
    if int(arguments.world_size) < 2 or not dist.is_initialized():
        return
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, {**versions(), **_settings(arguments)})
    for rank, other in enumerate(everybody[1:], 1):
        for name in sorted({*everybody[0], *other}):
            first, here = everybody[0].get(name), other.get(name)
            if first != here:
                raise ValueError(
                    f"process 0 has {name} {first} and process {rank} has {here}: install the same packages on all "
                    "machines and start them with the same command"
                )


def versions() -> dict[str, str]:
    """Of Python, of the packages that compute, and a digest of this package's own source."""
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return {**found, "hf_tfast (digest of its source)": digest.hexdigest()[:12]}


def _settings(arguments: Any) -> dict[str, str]:
    if not dataclasses.is_dataclass(arguments):
        return {}
    fields = (f.name for f in dataclasses.fields(arguments) if f.name not in OWN)
    return {f"--{name}": repr(getattr(arguments, name, None)) for name in fields}


def check_sizes(layout: Layout, config: Any, length: int) -> None:
    """ValueError where heads, widths, layers or the sequence do not divide over the processes that share them."""
    sizes = {
        "attention heads": getattr(config, "num_attention_heads", None),
        "key/value heads": getattr(config, "num_key_value_heads", None),
        "channels of the feed-forward (intermediate_size)": getattr(config, "intermediate_size", None),
    }
    for what, count in sizes.items():
        if count and count % layout.tensor:
            raise ValueError(
                f"tensor parallelism over {layout.tensor} processes cuts {what}, and {count} do not divide evenly: "
                f"choose a divisor of {count} (--tensor_parallel, or parallelism_config_tp_size)"
            )
    if length % layout.sequence:
        raise ValueError(
            f"sequence parallelism cuts rows of {length} tokens over {layout.sequence} processes, which is not even: "
            f"make --length a multiple of {layout.sequence}"
        )
    layers = getattr(config, "num_hidden_layers", None)
    if layers and layout.pipeline > layers:
        raise ValueError(f"a pipeline of {layout.pipeline} processes needs as many layers, and the model has {layers}")


def check_optimiser_reach(arguments: Any, layout: Layout) -> None:
    """ValueError where the optimiser keeps states that cannot be cut (those of bitsandbytes), or where fp16's scaler
    would meet weights that are cut beside weights that are whole, which it cannot unscale together."""
    if getattr(arguments, "fp16", False) and layout.tensor > 1:
        raise ValueError(
            f"fp16 with tensor parallelism (layout: {layout}): torch's scaler of gradients cannot take cut and whole "
            "weights together; use --bf16 true, which needs no scaler, or shard with --shard"
        )
    optim = getattr(arguments, "optim", "")
    name = str(getattr(optim, "value", optim))
    if ("8bit" in name or "bnb" in name or "paged" in name) and not layout.shard == layout.tensor == 1:
        raise ValueError(
            f"--optim {name} keeps its states in kernels of bitsandbytes, which know nothing of weights that are cut "
            f"over processes (layout: {layout}); use --optim adamw_torch there, whose states are cut too, or train "
            "whole models data parallel (recipes/accelerate/ddp.yaml)"
        )
