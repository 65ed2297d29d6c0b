"""Where a training went wrong: the first module whose output is not finite, or parameters whose gradients are not."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

__all__ = ["advice", "first_bad_module", "not_finite"]


def not_finite(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, x in named if x is not None and x.is_floating_point() and not bool(x.isfinite().all())]


@torch.no_grad()
def first_bad_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """In words: where numbers stop being finite in the forward of `run`; None where they all are finite.

    Weights come first; then, in the order of computation, the module that makes the first such output.
    """
    if bad := not_finite(model.named_parameters()):
        return f"the weights {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''} are not finite"
    met: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def hook(m: nn.Module, args: Any, out: Any, name: str = name) -> None:
                if not met and not_finite(("", x) for x in _tensors(out)):
                    met.append(f"{name or 'the model'} ({type(m).__name__})")

            stack.callback(module.register_forward_hook(hook).remove)
        run()
    return f"the first output that is not finite is that of {met[0]}" if met else None


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else ()
    return [x for value in values for x in _tensors(value)]


def advice(what: str, value: float, where: str | None, step: int, args: Any) -> str:
    """The message of a training that is stopped in `step`, from 1."""
    folder = Path(args.output_dir or "")
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved before"
    return (
        f"{what} became {value} at step {step}: {where or 'student and teacher are finite, the loss itself is not'}. "
        f"The training was stopped before weights were touched; {kept}. Lower learning_rate (now "
        f"{args.learning_rate}) or max_grad_norm, raise warmup_steps, or look at the data of that step"
    )
