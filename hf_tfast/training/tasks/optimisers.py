"""Optimisers by name: those of Transformers' Trainer, and those that it has no name for."""

from typing import Any

import torch
from transformers.training_args import OptimizerNames

__all__ = ["check_optimiser", "own_optimiser", "own_optimiser_kwargs"]

ALIASES = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}
OWN = ("adadelta",)
COMMON = ("adamw", "adamw_8bit", "sgd", "adagrad", "adadelta", "rmsprop", "adafactor")


def check_optimiser(name: Any) -> str:
    """The name that Trainer knows, or one of OWN. ValueError for others; ImportError where a package is missing."""
    found = ALIASES.get(str(getattr(name, "value", name)), str(getattr(name, "value", name)))
    known = {one.value for one in OptimizerNames} | set(OWN)
    if found not in known:
        raise ValueError(
            f"unknown optimiser {name!r}; common ones are {', '.join(COMMON)}; all: {', '.join(sorted(known))}"
        )
    if "bnb" in found or found.endswith("_8bit"):
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise ImportError(f'{name} needs bitsandbytes: pip install "hf_tfast[int8]"') from None
    return found


def own_optimiser(name: str) -> bool:
    """Is it one that Trainer has no name for?"""
    return name in OWN


def own_optimiser_kwargs(args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Adadelta (Zeiler, https://arxiv.org/abs/1212.5701); its learning rate multiplies steps of a size of their own,
    so 1.0 is the usual one. `optim_args` is read as Trainer does: "rho=0.95,eps=1e-6"."""
    given = dict(part.split("=", 1) for part in (args.optim_args or "").replace(" ", "").split(",") if part)
    if unknown := sorted(set(given) - {"rho", "eps"}):
        raise ValueError(f"adadelta takes optim_args rho and eps, got {unknown[0]!r}")
    return torch.optim.Adadelta, {"lr": args.learning_rate, **{name: float(x) for name, x in given.items()}}
