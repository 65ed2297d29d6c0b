"""`tfast estimate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ._app import Json, app, print_json


@app.command()
def estimate(
    model: Annotated[str, typer.Option(help="Hub id or folder (only its config is read), or JSON of TFastConfig.")],
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")],
    gpus: Annotated[int, typer.Option(help="How many there are.")],
    gpu: Annotated[str, typer.Option(help="h200, h100, a100 or l4.")] = "h100",
    batch: Annotated[int | None, typer.Option(help="Sequences of a step; default: one for every GPU.")] = None,
    mechanism: Annotated[
        str, typer.Option(help='"window:window=4096,sinks=4", "performer:features=256", ...')
    ] = "dense",
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward pass.")] = False,
    efficiency: Annotated[float, typer.Option(help="Share of the peak that matrix products reach.")] = 0.4,
    fp32: Annotated[bool, typer.Option("--fp32", help="Compute in fp32 instead of bf16 autocast.")] = False,
    show: Annotated[int, typer.Option(help="How many layouts.")] = 5,
    as_json: Json = False,
) -> None:
    """Memory and step time of training a model over many GPUs, on paper, and the layout to take."""
    from ..benchmarking.fidelity import parse
    from ..parallel.estimate import Run
    from ..parallel.estimate import estimate as compute
    from ..parallel.estimate_hardware import HARDWARE
    from ..parallel.estimate_model import Sizes

    if gpu not in HARDWARE:
        raise ValueError(f"unknown GPU {gpu!r}; known are {', '.join(HARDWARE)}")
    sizes = Sizes.of(_config(model))
    chosen = parse([mechanism if ":" in mechanism else f"{mechanism}:"], length)[0]
    run = Run(length=length, batch=gpus if batch is None else batch, gpus=gpus, checkpointing=checkpointing,
              efficiency=efficiency, narrow=4 if fp32 else 2)  # fmt: skip
    found = compute(sizes, chosen, run, HARDWARE[gpu])[:show]
    if as_json:
        print_json({"parameters": sizes.parameters, "mechanism": chosen.to_dict(), "gpu": HARDWARE[gpu].name,
                    "layouts": [one.to_dict() for one in found]})  # fmt: skip
        return
    print(f"{sizes.parameters / 1e9:.3g} billion parameters, {chosen}, {run.batch} x {length} tokens a step, "
          f"{gpus} x {HARDWARE[gpu].name}")  # fmt: skip
    if not found[0].fits:
        print("No layout fits into memory; these need the least. Try --checkpointing, a smaller --batch or more GPUs.")
    for one in found:
        parts = {"weights": one.weights, "gradients": one.gradients, "optimiser": one.optimiser, "copies": one.copies,
                 "activations": one.activations, "buckets": one.buckets}  # fmt: skip
        told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        times = f"{one.compute_s:.3g} + {one.bandwidth_s:.3g}, network {one.network_s:.3g}"
        print(f"{one.shares!s:<40} {one.memory / 1e9:7.1f} GB ({told}), at least {one.step_s:.3f} s ({times}), "
              f"bound by {one.bound}, {one.sent / 1e9:.3g} GB sent"
              + ("" if one.shares.runs else " (the recipes do not combine these yet)"))  # fmt: skip
    print(f"A sequence in generation keeps {found[0].cache / 1e9:.3g} GB of keys and values.")


def _config(model: str):  # type: ignore[no-untyped-def]
    from transformers import AutoConfig

    from ..models.configuration_tfast import TFastConfig

    if model.lstrip().startswith("{"):
        return TFastConfig(**json.loads(model))
    return AutoConfig.from_pretrained(Path(model) if Path(model).exists() else model)
