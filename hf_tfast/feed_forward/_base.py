"""The contract that every form of a feed-forward fulfils, and how forms are found.

A feed-forward is one or two linear layers up (with a gate), an activation, and one down:

    plain   down(act(up(x)))              gated   down(act(gate(x)) * up(x))

A form replaces these layers in place, at their paths, by modules with plain parameters. It does so twice in the life
of a checkpoint: from weights (conversion), and from shapes alone on the meta device (reload). What the weights
decided, ranks and widths, is a `size` that the saved plan carries from the one to the other.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ._moments import Moments

STORES = 3  # order of the forms that store what the others have made: no weight can be trained after them

Size = dict[str, Any]  # path of a replaced layer -> what the weights decided, in JSON's types


@dataclass(frozen=True, kw_only=True)
class Block:
    """One feed-forward of a model.

    model   the model that `ups` and `down` are paths in.
    ups     paths of the layers [hidden -> inner]: the gate first, if there is one.
    down    path of the layer [inner -> hidden].
    parts   how many layers the one module of `ups` holds side by side: 2 for a fused gate_up_proj, else 1.
    """

    model: nn.Module
    stack: str
    layer: int
    ups: tuple[str, ...]
    down: str
    parts: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.ups, self.down)

    def get(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` at `path`, in the training mode of what was there."""
        module.train(self.get(path).training)
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, layer) of every linear layer at or below the block's paths: after LowRank there are two for one."""
        for path in self.paths:
            for name, module in self.get(path).named_modules():
                if is_linear(module):
                    yield (f"{path}.{name}" if name else path), module


class Form:
    """Hyper-parameters that know how to make a feed-forward fast. Subclasses are frozen, keyword-only dataclasses:
    their fields are the config, and `to_dict` goes into config.json.

    name         the file's name.
    order        its place among the forms of a layer: 0 prunes, 1 factorises, 2 rounds activations, 3 stores integers.
    lossless     can `restore` put the dense layers back as they were?
    calibrated   does `apply` read moments of the layers' inputs?
    """

    name: ClassVar[str]
    order: ClassVar[int]
    lossless: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        return False

    @property
    def from_shapes(self) -> bool:
        """Do sizes follow from the shapes alone, so that a model can begin with this form and train it?"""
        return not self.calibrated

    def reads(self, block: Block) -> tuple[str, ...]:
        """Paths of the layers whose inputs' moments `apply` reads."""
        return block.paths if self.calibrated else ()

    def apply(self, block: Block, size: Size | None = None, moments: dict[str, Moments] | None = None) -> Size:
        """Replace the layers of `block` in place and return the sizes.

        size      what a saved plan carries, None on first conversion. On the meta device modules are only built; where
                  `size` is None there, it must follow from the shapes, else ValueError.
        moments   of the inputs of the block's layers by path, where the form is `calibrated`.
        """
        raise NotImplementedError

    def finish(self, block: Block) -> None:
        """Called once the weights are there, after conversion and after a checkpoint was loaded."""

    def restore(self, block: Block) -> None:
        """Put the layers back that `apply` found."""
        raise NotImplementedError(f"{type(self).__name__} has thrown the dense weights away")

    def to_dict(self) -> dict[str, Any]:
        """The form of config.json: {"form": name, field: value, ...}."""
        return {"form": self.name, **{name: _lists(value) for name, value in asdict(self).items()}}  # type: ignore[call-overload]

    def _moments(self, path: str, moments: dict[str, Moments] | None) -> Moments:
        if moments is None or path not in moments:
            raise ValueError(
                f"{self!r} is made from data, and there is none for {path}: convert the model with "
                "hf_tfast.convert(model, plan, calibration=batches)"
            )
        return moments[path]


@cache
def forms() -> dict[str, type[Form]]:
    """Every form by name, in alphabetical order: one public file each, found on disk rather than listed here."""
    found: dict[str, type[Form]] = {}
    for file in sorted(iter_modules(import_module(__package__).__path__), key=lambda f: f.name):
        if file.name.startswith("_"):
            continue
        module = import_module(f"{__package__}.{file.name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Form) and cls.__module__ == module.__name__:
                if cls.name != file.name:
                    raise ValueError(f"{cls.__name__}.name is {cls.name!r}, its file {file.name}.py: one word is due")
                found[cls.name] = cls
    return found


def form_from_dict(given: dict[str, Any]) -> Form:
    """The form that `to_dict` wrote. ValueError names what is unknown and what exists."""
    rest = dict(given)
    name = rest.pop("form", None)
    if name not in forms():
        raise ValueError(f"unknown feed-forward form {name!r}; expected one of {', '.join(forms())}")
    cls = forms()[name]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if unknown := [field for field in rest if field not in known]:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return cls(**{field: _tuples(value) for field, value in rest.items()})


def _lists(value: Any) -> Any:
    """As JSON gives it back."""
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    """As a frozen dataclass holds it, so that it hashes and compares."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer: torch's, or GPT-2's transposed one. Not a subclass, which may mean something else."""
    return type(module) in (nn.Linear, Conv1D)


def weight_of(module: nn.Module, path: str = "") -> Tensor:
    """[out in] of a plain linear layer. ValueError names any other layer."""
    if not is_linear(module):
        raise ValueError(
            f"{path or 'the layer'} is a {type(module).__name__}; feed-forward forms replace nn.Linear and Conv1D only"
        )
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """[out] of a linear layer, detached, or None."""
    bias: Any = module.bias
    return None if bias is None else bias.detach()


def same_kind(weight: Tensor) -> dict[str, Any]:
    """Device and dtype for a parameter that replaces `weight`."""
    return {"device": weight.device, "dtype": weight.dtype}


def linear(weight: Tensor, bias: Tensor | None, trained: bool = True) -> nn.Linear:
    """An nn.Linear around weight [out in]; on meta only the shapes count."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)
    return layer


def check_finite(weight: Tensor, path: str) -> None:
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{path} has weights that are not finite: nothing can be made from them")
