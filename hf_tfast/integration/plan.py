"""FastPlan: which layers of a model run which mechanism. It travels as `quantization_config` in config.json.

    FastPlan(attention=Window(window=512, sinks=4))
    FastPlan(attention={"0": Dense(), "1-": Window(window=512)})
    FastPlan(attention={"encoder.0-3": Window(window=64), "decoder.4-": Window(window=512)})

Layers that a plan does not name stay dense, and so does cross-attention.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..attention import Mechanism, mechanism_from_dict
from ..attention.dense import Dense

__all__ = ["FastPlan", "SavedFastPlan"]

VERSION = 1
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


class FastPlan(QuantizationConfigMixin):
    """A plan for a whole model.

    attention     a mechanism for all self-attention of the model (of its text stack, where it also has a vision or
                  audio part), or a dict from layer ranges to mechanisms.
    feed_forward  must be None: this version holds no feed-forward forms.
    base          must be None: this version converts models that are not quantised otherwise.

    Raises ValueError for unknown mechanisms, malformed or overlapping ranges, and a plan that changes nothing.
    """

    def __init__(
        self,
        attention: Mechanism | dict[Any, Any] | None = None,
        feed_forward: Any = None,
        base: Any = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = "tfast"  # type: ignore[assignment]
        if unknown:
            raise ValueError(f"FastPlan has no field {next(iter(unknown))!r}; it has attention, feed_forward and base")
        if feed_forward is not None:
            raise ValueError(f"this version of hf_tfast has no feed-forward forms, got feed_forward={feed_forward!r}")
        if base is not None:
            raise ValueError(f"this version of hf_tfast cannot build on another quantisation, got base={base!r}")
        if attention is None or attention == {}:
            raise ValueError(
                "this plan changes nothing: give attention=Window(window=512), say, or a dict of layer ranges"
            )
        self._attention = _attention(attention)

    @property
    def attention(self) -> Mechanism | dict[str, Mechanism]:
        """What was given: one mechanism, or a dict from layer ranges to mechanisms."""
        if isinstance(self._attention, Mechanism):
            return self._attention
        return {layers.text: mechanism for layers, mechanism in self._attention}

    @property
    def ranges(self) -> list[LayerRange]:
        return [] if isinstance(self._attention, Mechanism) else [layers for layers, _ in self._attention]

    def mechanism(self, layer: int, names: Iterable[str | None] = (None,)) -> Mechanism:
        """What self-attention of this layer runs, in the stack that goes by any of `names`; Dense() if not named."""
        if isinstance(self._attention, Mechanism):
            return self._attention
        known = tuple(names)
        return next((m for layers, m in self._attention if layers.stack in known and layer in layers), Dense())

    def to_dict(self) -> dict[str, Any]:
        """The form of config.json."""
        if isinstance(self._attention, Mechanism):
            attention = self._attention.to_dict()
        else:
            attention = {layers.text: mechanism.to_dict() for layers, mechanism in self._attention}
        return {"quant_method": "tfast", "plan_version": VERSION, "attention": attention}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The plan that `to_dict` wrote, as `SavedFastPlan`: a second plan for its checkpoint is then refused by
        Transformers, which compares the classes. ValueError says what is wrong with a corrupt plan."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"a plan in config.json is a dict, got {config_dict!r}")
        given = dict(config_dict)
        version = given.pop("plan_version", None)
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"the plan in config.json has plan_version {version!r}, but this hf_tfast reads version {VERSION}: "
                "the plan is corrupt or newer (pip install -U hf_tfast)"
            )
        if given.pop("quant_method", "tfast") != "tfast":
            raise ValueError(f"expected quant_method 'tfast', got {config_dict['quant_method']!r}")
        if "attention" not in given:
            raise ValueError(f"the plan in config.json has no 'attention': it is corrupt ({sorted(config_dict)})")
        plan = SavedFastPlan(**given)
        return (plan, kwargs) if return_unused_kwargs else plan

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict: Transformers asks so when it is given a live model's config, from_pretrained(config=...)."""
        return self.to_dict().get(name, default)

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"  # layer ranges keep their order

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FastPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __repr__(self) -> str:
        return f"FastPlan(attention={self.attention!r})"


class SavedFastPlan(FastPlan):
    """A plan that a checkpoint already has."""


def _attention(given: Any) -> Mechanism | list[tuple[LayerRange, Mechanism]]:
    if isinstance(given, Mechanism):
        return given
    if isinstance(given, type) and issubclass(given, Mechanism):
        raise ValueError(f"expected a mechanism such as {given.__name__}(...), got the class itself")
    if not isinstance(given, dict):
        raise ValueError(f"attention is a mechanism or a dict from layer ranges to mechanisms, got {given!r}")
    if "mechanism" in given:
        return mechanism_from_dict(given)
    layers = [(LayerRange.parse(text), _one(text, value)) for text, value in given.items()]
    for n, (one, _) in enumerate(layers):
        for other, _ in layers[:n]:
            if one.meets(other):
                raise ValueError(f"the layer ranges {other.text!r} and {one.text!r} overlap")
    return layers


def _one(text: Any, value: Any) -> Mechanism:
    if isinstance(value, Mechanism):
        return value
    if isinstance(value, dict):
        return mechanism_from_dict(value)
    raise ValueError(f"layers {text!r}: expected a mechanism such as Window(window=512), got {value!r}")
