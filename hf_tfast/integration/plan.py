"""FastPlan: which layers of a model run which mechanism and form. It travels as `quantization_config` in config.json.

    FastPlan(attention=Window(window=512, sinks=4))
    FastPlan(attention={"0": Dense(), "1-": Window(window=512)}, feed_forward=LowRank(ratio=0.5))
    FastPlan(feed_forward={"encoder.0-3": [Pruned(ratio=0.75), Int8()], "decoder.0-": Int8()})
    FastPlan(attention=Window(window=512), base=BitsAndBytesConfig(load_in_4bit=True))

Layers that a plan does not name stay as they are, and so does cross-attention.
"""

import json
from collections.abc import Iterable
from typing import Any

from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from ..attention import Mechanism, mechanism_from_dict
from ..attention.dense import Dense
from ..feed_forward import Form, form_from_dict
from ._ranges import LayerRange, PerLayer

__all__ = ["FastPlan", "SavedFastPlan"]

VERSION = 1


class FastPlan(QuantizationConfigMixin):
    """A plan for a whole model.

    attention     a mechanism for all self-attention of the model (of its text stack, where it also has a vision or
                  audio part), a dict from layer ranges to mechanisms, or None: as the user asks when loading.
    feed_forward  a form, a list of forms that are applied in that order, a dict from layer ranges to either, or None.
    base          BitsAndBytesConfig(load_in_4bit=True) or (load_in_8bit=True): Transformers' own quantiser does that
                  to the weights while they load, and the plan adds its attention: LoRA on long inputs trains so.
    sizes         made by conversion, not by hand: what the weights decided (ranks, widths), by feed-forward and form.

    Raises ValueError for unknown mechanisms and forms, malformed or overlapping ranges, forms in an order that cannot
    work, and a plan that changes nothing.
    """

    def __init__(
        self,
        attention: Mechanism | dict[Any, Any] | None = None,
        feed_forward: Form | list[Any] | dict[Any, Any] | None = None,
        base: Any = None,
        sizes: dict[str, list[dict[str, Any]]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = "tfast"  # type: ignore[assignment]
        if unknown:
            raise ValueError(f"FastPlan has no field {next(iter(unknown))!r}; it has attention, feed_forward and base")
        empty: tuple[Any, ...] = (None, {}, [])
        if attention in empty and feed_forward in empty:
            raise ValueError(
                "this plan changes nothing: give attention=Window(window=512) or feed_forward=LowRank(ratio=0.5), "
                "say, or a dict of layer ranges"
            )
        self._attention = None if attention in empty else _attention(attention)
        self._feed_forward = None if feed_forward in empty else _feed_forward(feed_forward)
        self.sizes = sizes
        self.base = None if base is None else _base(base, self)

    @property
    def attention(self) -> Mechanism | dict[str, Mechanism] | None:
        """What was given: one mechanism, or a dict from layer ranges to mechanisms."""
        return None if self._attention is None else self._attention.map(lambda mechanism: mechanism)

    @property
    def feed_forward(self) -> Form | list[Form] | dict[str, Form | list[Form]] | None:
        """What was given: one form, a list of them, or a dict from layer ranges to either."""
        return None if self._feed_forward is None else self._feed_forward.map(_shortest)

    @property
    def ranges(self) -> list[LayerRange]:
        """Of the attention."""
        return [] if self._attention is None else [layers for layers, _ in self._attention.ranges]

    @property
    def feed_forward_ranges(self) -> list[LayerRange]:
        return [] if self._feed_forward is None else [layers for layers, _ in self._feed_forward.ranges]

    def mechanism(self, layer: int, names: Iterable[str | None] = (None,)) -> Mechanism:
        """What self-attention of this layer runs, in the stack that goes by any of `names`; Dense() if not named."""
        return (None if self._attention is None else self._attention.at(layer, names)) or Dense()

    def forms(self, layer: int, names: Iterable[str | None] = (None,)) -> tuple[Form, ...]:
        """What the feed-forward of this layer becomes, in order; () if not named."""
        return (None if self._feed_forward is None else self._feed_forward.at(layer, names)) or ()

    @property
    def every_form(self) -> list[Form]:
        """All forms that the plan has, each as often as it is given."""
        return [] if self._feed_forward is None else [form for forms in self._feed_forward for form in forms]

    def to_dict(self) -> dict[str, Any]:
        """The form of config.json."""
        found: dict[str, Any] = {"quant_method": "tfast", "plan_version": VERSION}
        if self._attention is not None:
            found["attention"] = self._attention.map(lambda mechanism: mechanism.to_dict())
        if self._feed_forward is not None:
            found["feed_forward"] = self._feed_forward.map(
                lambda forms: forms[0].to_dict() if len(forms) == 1 else [form.to_dict() for form in forms]
            )
        if self.base is not None:
            found["base"] = self.base.to_dict()
        if self.sizes is not None:
            found["sizes"] = self.sizes
        return found

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
        if "attention" not in given and "feed_forward" not in given:
            raise ValueError(
                f"the plan in config.json has neither 'attention' nor 'feed_forward': it is corrupt "
                f"({sorted(config_dict)})"
            )
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
        given = {"attention": self.attention, "feed_forward": self.feed_forward, "base": self.base}
        return f"FastPlan({', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)})"


class SavedFastPlan(FastPlan):
    """A plan that a checkpoint already has."""


def _base(given: Any, plan: FastPlan) -> BitsAndBytesConfig:
    if isinstance(given, dict) and given.get("quant_method") == "bitsandbytes":  # from config.json
        try:
            given = BitsAndBytesConfig(
                **{name: value for name, value in given.items() if name != "quant_method" and name[0] != "_"}
            )
        except TypeError as error:
            raise ValueError(f"the plan in config.json has a base that cannot be: it is corrupt ({error})") from error
    if not isinstance(given, BitsAndBytesConfig) or not (given.load_in_4bit or given.load_in_8bit):
        raise ValueError(
            "base is another quantisation, BitsAndBytesConfig(load_in_4bit=True) or (load_in_8bit=True), got "
            f"{type(given).__name__}"
        )
    if plan.every_form:
        raise ValueError(
            f"{plan.every_form[0]!r} is made from dense weights, and base={type(given).__name__} keeps none: leave "
            "feed_forward out, or base (Int8() is LLM.int8 for the feed-forwards alone)"
        )
    if plan.attention is None:
        raise ValueError("a plan with a base has an attention; without, give the base itself as quantization_config")
    return given


def _attention(given: Any) -> PerLayer[Mechanism]:
    if not isinstance(given, Mechanism | dict | type):
        raise ValueError(f"attention is a mechanism or a dict from layer ranges to mechanisms, got {given!r}")
    return PerLayer.read(given, _mechanism, isinstance(given, dict) and "mechanism" not in given)


def _mechanism(value: Any) -> Mechanism:
    if isinstance(value, type) and issubclass(value, Mechanism):
        raise ValueError(f"expected a mechanism such as {value.__name__}(...), got the class itself")
    if isinstance(value, Mechanism):
        return value
    if isinstance(value, dict):
        return mechanism_from_dict(value)
    raise ValueError(f"expected a mechanism such as Window(window=512), got {value!r}")


def _feed_forward(given: Any) -> PerLayer[tuple[Form, ...]]:
    if not isinstance(given, Form | dict | list | tuple | type):
        raise ValueError(
            f"feed_forward is a form, a list of forms, or a dict from layer ranges to them, got {given!r}"
        )
    return PerLayer.read(given, _forms, isinstance(given, dict) and "form" not in given)


def _forms(value: Any) -> tuple[Form, ...]:
    forms = tuple(_form(each) for each in (value if isinstance(value, list | tuple) else [value]))
    if not forms:
        raise ValueError("an empty list of forms changes nothing: leave these layers out")
    for before, after in zip(forms, forms[1:], strict=False):
        if before.order >= after.order:
            raise ValueError(
                f"{type(after).__name__} cannot come after {type(before).__name__}: forms are given in the order "
                "Pruned, LowRank or TensorTrain, Activation, Int8, each once"
            )
    return forms


def _form(value: Any) -> Form:
    if isinstance(value, type) and issubclass(value, Form):
        raise ValueError(f"expected a form such as {value.__name__}(...), got the class itself")
    if isinstance(value, Form):
        return value
    if isinstance(value, dict):
        return form_from_dict(value)
    raise ValueError(f"expected a feed-forward form such as LowRank(ratio=0.5), got {value!r}")


def _shortest(forms: tuple[Form, ...]) -> Form | list[Form]:
    return forms[0] if len(forms) == 1 else list(forms)
