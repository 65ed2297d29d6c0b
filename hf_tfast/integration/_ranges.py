"""Which layers a plan means: ranges of layers in named stacks, and one value for each.

Window(...)                                                one value for all layers
{"0": Dense(), "1-": Window(...)}                          by layer, both ends included
{"encoder.0-3": Window(...), "decoder.4-": Window(...)}    in stacks that count their layers apart
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ._modules import Survey

T = TypeVar("T")
_RANGE = re.compile(r"(?:(?P<stack>[A-Za-z_][\w.]*)\.)?(?P<first>\d+)(?P<more>-(?P<last>\d+)?)?")


@dataclass(frozen=True)
class LayerRange:
    """The layers that one key of a plan names: "4", "0-3" or "5-" (`last` None: up to the end), in a stack or any."""

    text: str
    stack: str | None
    first: int
    last: int | None

    @classmethod
    def parse(cls, text: Any) -> "LayerRange":
        if isinstance(text, int) and not isinstance(text, bool):
            text = str(text)
        match = _RANGE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'a layer range is "0", "1-4", "5-" or "encoder.0-3", got {text!r}')
        first = int(match["first"])
        last = first if match["more"] is None else int(match["last"]) if match["last"] else None
        if last is not None and last < first:
            raise ValueError(f"the layer range {text!r} ends before it begins")
        return cls(text, match["stack"], first, last)

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer and (self.last is None or layer <= self.last)

    def meets(self, other: "LayerRange") -> bool:
        below = self.last is None or other.first <= self.last
        return self.stack == other.stack and below and (other.last is None or self.first <= other.last)


@dataclass(frozen=True, eq=False)
class PerLayer(Generic[T]):
    """One value for all layers, or some for ranges that do not overlap."""

    everywhere: T | None
    ranges: tuple[tuple[LayerRange, T], ...] = ()

    @classmethod
    def read(cls, given: Any, one: Callable[[Any], T], ranged: bool) -> "PerLayer[T]":
        """From what the user gave: `one` reads a single value, `ranged` says that `given` is a dict of ranges."""
        if not ranged:
            return cls(one(given))
        ranges: list[tuple[LayerRange, T]] = []
        for text, value in given.items():
            layers = LayerRange.parse(text)
            for other, _ in ranges:
                if layers.meets(other):
                    raise ValueError(f"the layer ranges {other.text!r} and {layers.text!r} overlap")
            try:
                ranges.append((layers, one(value)))
            except ValueError as error:
                raise ValueError(f"layers {text!r}: {error}") from None
        return cls(None, tuple(ranges))

    def __iter__(self) -> Iterator[T]:
        """Every value that is given."""
        yield from [self.everywhere] if self.everywhere is not None else (value for _, value in self.ranges)

    def at(self, layer: int, names: Iterable[str | None]) -> T | None:
        """What this layer has, in the stack that goes by any of `names`; None where it is not named."""
        if self.everywhere is not None:
            return self.everywhere
        known = tuple(names)
        return next((value for layers, value in self.ranges if layers.stack in known and layer in layers), None)

    def map(self, change: Callable[[T], Any]) -> Any:
        """The same with other values, in the form that the user gives."""
        if self.everywhere is not None:
            return change(self.everywhere)
        return {layers.text: change(value) for layers, value in self.ranges}


def planned_stacks(found: Survey, ranges: list[LayerRange]) -> list[str]:
    """The stacks that ranges speak of. Unnamed: the text, or both stacks of an encoder-decoder, or all there is."""
    meant = [stack for stack in found.stacks if "text" in stack.split(".")]
    if not meant:
        meant = [stack for stack in found.stacks if stack not in found.vision] or found.stacks
    planned = []
    for layers in ranges:
        if layers.stack is None:
            if len(meant) > 1:
                raise ValueError(
                    f"this model has the stacks {', '.join(meant)}: say which, {meant[0]}.{layers.text} for instance"
                )
            planned += meant
        else:
            planned.append(_stack_named(layers.stack, found, meant))
    return list(dict.fromkeys(planned)) if ranges else meant


def _stack_named(name: str, found: Survey, meant: list[str]) -> str:
    plain = name.removesuffix("_config")
    if plain in found.stacks:
        return plain
    if plain == "text" and len(meant) == 1:
        return meant[0]
    raise ValueError(f"the plan names the stack {name!r}, but the model has {', '.join(found.stacks)}")


def names_of(stack: str, planned: list[str]) -> Iterator[str | None]:
    """What a plan may call this stack."""
    yield from (stack, f"{stack}_config")
    if len(planned) == 1 or "text" in stack.split("."):
        yield from (None, "text", "text_config")


def check_layers(found: Survey, ranges: list[LayerRange], planned: list[str], what: str) -> None:
    """Every range must name a layer that exists, up to its written end; `what` the layers hold."""
    for layers in ranges:
        for stack in planned:
            if layers.stack not in tuple(names_of(stack, planned)):
                continue
            have = found.layers(stack)
            if not any(layer in layers for layer in have) or (layers.last or 0) > max(have):
                span = f"{have[0]} to {have[-1]}" if have else "none"
                raise ValueError(f"the plan names layers {layers.text!r}, but {stack} has {what} in layers {span}")
