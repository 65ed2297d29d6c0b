"""Which modules of a model are attention, which stack and layer they belong to, and whether Transformers' attention
interface reaches them. Nothing here changes a model."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "Found",
    "Survey",
    "heads_of",
    "is_cross",
    "layer_numbers",
    "parts_of",
    "stack_namer",
    "survey",
    "through_interface",
]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("
_CROSS_PATH = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """An attention module: where it is, and how plans name it."""

    path: str
    module: nn.Module
    stack: str
    layer: int
    kind: str


@dataclass(frozen=True)
class Survey:
    """Every attention module of a model, and those that Transformers' interface does not reach, with the reason."""

    found: list[Found]
    outside: dict[str, list[str]]  # stack -> "path (Class): reason"
    vision: frozenset[str]  # stacks that read images

    @property
    def stacks(self) -> list[str]:
        return list(dict.fromkeys([*(f.stack for f in self.found), *self.outside]))

    def layers(self, stack: str) -> list[int]:
        """Numbers of the stack's layers that hold self-attention."""
        return sorted({f.layer for f in self.found if f.stack == stack and f.kind == "self"})


@cache
def _sources(cls: Any) -> tuple[str, ...]:
    """Source texts of the class and of the classes it inherits from, up to nn.Module."""
    texts = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        try:
            texts.append(inspect.getsource(base))
        except (OSError, TypeError):  # a class made in a console or by exec has no source
            texts.append("")
    return tuple(texts)


def through_interface(cls: Any) -> bool:
    """Does this class fetch its attention function from Transformers' interface? Read from its own source."""
    return any(_INTERFACE in text for text in _sources(cls))


def _adds_position_bias(cls: Any) -> bool:
    return any("position_bias=" in text for text in _sources(cls) if _INTERFACE in text)


@cache
def _takes_other_states(cls: Any) -> bool:
    """Can the class be called as cross-attention?"""
    try:
        names = inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):
        return False
    return any(name in names for name in ("key_value_states", "encoder_hidden_states"))


def _called_cross(cls: Any, path: str) -> bool:
    return "cross" in cls.__name__.lower() or _CROSS_PATH.search(path) is not None


def is_cross(module: nn.Module, path: str = "") -> bool | None:
    """Is this attention module cross-attention? None where neither its class, its flags nor its path tell."""
    cls: Any = type(module)
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return flag
    if _called_cross(cls, path):
        return True
    if getattr(module, "is_causal", None) is True or not _takes_other_states(cls) or "self" in path.split(".")[-1]:
        return False
    if getattr(module, "is_decoder", None) is True:  # one class for both, as in BART: in a decoder, not causal
        return True
    return False if path or getattr(module, "is_decoder", None) is False else None


def heads_of(module: nn.Module) -> int | None:
    """Query heads of an attention module before any sharding, where it or its config says."""
    for source in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads"):
            if isinstance(heads := getattr(source, name, None), int):
                return heads
    return None


def parts_of(
    config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """The config and every sub-config below it, each with the attribute names that lead there."""
    yield path, config
    for name in getattr(config, "sub_configs", {}):
        if isinstance(sub := getattr(config, name, None), PreTrainedConfig):
            yield from parts_of(sub, (*path, name))


def survey(model: PreTrainedModel) -> Survey:
    """Walk a model and name its attention modules. Reads classes and configs only; works on the meta device."""
    owners: dict[str, PreTrainedModel] = {}
    attention: list[tuple[str, nn.Module]] = []
    named: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[path] = module
        elif through_interface(module.__class__):
            attention.append((path, module))
        elif re.search(r"attention|attn", type(module).__name__, re.IGNORECASE) and any(
            True for _ in module.parameters()
        ):
            named.append((path, module))
    stack_of = _Stacks(model, owners)
    served = [path for path, _ in attention]
    outside: dict[str, list[str]] = {}
    for path, module in _outermost(named):
        if "pool" in type(module).__name__.lower() or _called_cross(type(module), path):
            continue  # pooling by attention and cross-attention stay dense anyway
        if not any(_inside(p, path) or _inside(path, p) for p in served):
            reason = f"{path} ({type(module).__name__}): does not call Transformers' attention interface"
            outside.setdefault(stack_of(path), []).append(reason)
    numbered: dict[tuple[str, str], list[tuple[str, nn.Module]]] = {}
    for path, module in attention:
        stack = stack_of(path)
        if _adds_position_bias(module.__class__):
            reason = f"{path} ({type(module).__name__}): adds a position bias [heads, queries, keys] to the scores"
            outside.setdefault(stack, []).append(reason)
        else:
            kind = "cross" if is_cross(module, path) else "self"
            numbered.setdefault((stack, kind), []).append((path, module))
    found = [
        Found(path, module, stack, layer, kind)
        for (stack, kind), members in numbered.items()
        for (path, module), layer in zip(members, layer_numbers([path for path, _ in members]), strict=True)
    ]
    return Survey(found, outside, stack_of.vision([*(f.path for f in found), *(n for n, _ in named)]))


def _outermost(named: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in named if not any(_inside(path, other) for other, _ in named)]


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def layer_numbers(paths: list[str]) -> list[int]:
    """The block number in each path where that tells the paths apart, else their order."""
    numbers = [next((int(part) for part in path.split(".") if part.isdigit()), -1) for path in paths]
    apart = len(set(numbers)) == len(paths) and -1 not in numbers
    return numbers if apart else list(range(len(paths)))


def stack_namer(model: PreTrainedModel) -> "_Stacks":
    """A function from the path of a module to the name of its stack."""
    owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    return _Stacks(model, owners)


class _Stacks:
    """Names the stack of a path: "encoder" / "decoder" where a model has two, else what its config calls the part."""

    def __init__(self, model: PreTrainedModel, owners: dict[str, PreTrainedModel]) -> None:
        self.owners = owners
        self.two = bool(getattr(model.config, "is_encoder_decoder", False))
        self.names = {id(config): path for path, config in parts_of(model.config)}

    def __call__(self, path: str) -> str:
        outer = [p for p in self.owners if p == "" or _inside(path, p)]
        if self.two:
            two = next((part for part in path.split(".") if part in ("encoder", "decoder")), None)
            if two:
                return two
        for prefix in sorted(outer, key=len, reverse=True):
            owner = self.owners[prefix]
            name = self.names.get(id(owner.config), ())
            if name:
                part = ".".join(word.removesuffix("_config") for word in name)
                inner = path[len(prefix) :].split(".")
                sub = next((w for w in inner if w in ("encoder", "decoder")), None)
                return f"{part}.{sub}" if sub and getattr(owner.config, "is_encoder_decoder", False) else part
            if prefix and self._reads(owner) == "vision" != self._reads(self.owners[""]):
                return "vision"
        return self._reads(self.owners[""])

    def vision(self, paths: list[str]) -> frozenset[str]:
        """The stacks whose nearest model reads images."""
        images = set()
        for path in paths:
            nearest = max((p for p in self.owners if p == "" or _inside(path, p)), key=len)
            if self._reads(self.owners[nearest]) == "vision":
                images.add(self(path))
        return frozenset(images)

    @staticmethod
    def _reads(model: PreTrainedModel) -> str:
        names = {"pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
        return names.get(getattr(model, "main_input_name", ""), "text")
