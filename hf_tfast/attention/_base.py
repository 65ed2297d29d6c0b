"""The contract that every attention mechanism fulfils, and how mechanisms are found.

Axes    b batch, h query heads, g key/value heads (h % g == 0), i queries, j keys, d key width, e value width.
Layout  q [b h i d]   k [b g j d]   v [b g j e]   ->   o [b h i e]
        i <= j: the queries are the last i positions, so prefill, chunked prefill and decoding are one case.

`attend` cuts a batch into full rows (see `_rows.py`), so that a mechanism never meets padding or segments.
"""

from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backends.score import Score, softmax_attention


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Who may read whom, apart from the mechanism's own pattern.

    causal    position i reads positions j <= i only.
    valid     [b j] bool, or None for all: the keys (and queries in their slots) that exist. Content of others never
              reaches a valid row; their own rows are zeros.
    segments  [b j] integer, or None: packed documents; positions of different segments do not meet, 0 is padding.
    start     position of the first valid key given, counted from the row's first valid token: an integer, or one per
              row as [b]. Not 0 once a sliding cache has dropped keys.
    kept      how many keys in front of the gap that a cache has left: key n has position n below `kept` and n + start
              from there on. An integer, or one per row as [b].
    """

    causal: bool = False
    valid: Tensor | None = None
    segments: Tensor | None = None
    start: int | Tensor = 0
    kept: int | Tensor = 0

    def positions(self, keys: int, device: torch.device | None = None) -> Tensor:
        """[j] int64: the position of every key of a full row."""
        n = torch.arange(keys, device=device)
        return torch.where(n < self.kept, n, n + self.start)


class Mechanism:
    """Hyper-parameters that know how to attend. Subclasses are frozen, keyword-only dataclasses: their fields are the
    config, and `to_dict` goes into config.json.

    name        the file's name; "window" becomes attn_implementation "tfast_window".
    small       fields at which a test of 40 tokens means something.
    causal      False where no causal form exists: causal use is refused.
    calibrated  True where it takes `Score.basis`, which `calibrate` makes, and has a causal form with it.
    dropout     False where dropping weights has no meaning: dropout > 0 is refused.
    backends    the fast paths that exist beside the reference; those in forward_only have plain torch's gradient.
    """

    name: ClassVar[str]
    small: ClassVar[dict[str, Any]] = {}
    causal: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    dropout: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    forward_only: ClassVar[tuple[str, ...]] = ()

    def choose(self, q: Tensor, k: Tensor, mask: Mask) -> Any:
        """What the content decides (buckets, top keys, a basis): made once, without gradient, for both paths."""
        return None

    def allowed(self, choice: Any, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *, causal: bool = False) -> Tensor:
        """May query position i read key position j, in row b and head h? Bool, for broadcastable index tensors.

        The one definition of a sparse pattern; `reference` adds j <= i if causal. Static patterns ignore `choice`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a pattern of pairs")

    def reference(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, choice: Any = None) -> Tensor:
        """The definition on full rows (mask.valid and mask.segments are None): readable, any device, O(i j)."""
        (b, h, i, _), j = q.shape, k.shape[2]
        if choice is None:
            choice = self.choose(q, k, mask)
        at = mask.positions(j, q.device)
        rows = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
        heads = torch.arange(score.first_head, score.first_head + h, device=q.device).view(-1, 1, 1)
        pairs = self.allowed(choice, rows, heads, at[j - i :, None], at, causal=mask.causal)
        if mask.causal:
            pairs = pairs & (at <= at[j - i :, None])
        return softmax_attention(q, k, v, pairs, score, at)

    def fast(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, backend: str = "torch", choice: Any = None
    ) -> Tensor:
        """The same numbers as `reference`, cheaply, on full rows."""
        raise NotImplementedError(f"{type(self).__name__} has no fast path")

    def check(self, q: Tensor, k: Tensor, mask: Mask, score: Score) -> None:
        """Raise ValueError for a call that the mechanism has no form for. Asked before rows are cut."""
        if mask.causal and not self.causal:
            raise ValueError(f"{self.name} has no causal form: a query would read the future; {causal_ones()}")
        if score.basis is not None:
            raise ValueError(f"{self.name} makes no use of a calibrated basis; leave score.basis out")

    def lacks(self, backend: str, mask: Mask, score: Score) -> str | None:
        """Why these fields have no form on one of `backends` for such a call, and what to do; None where they have."""
        return None

    def basis_shape(self, g: int, d: int) -> tuple[int, int, int] | None:
        """[g d r] of the tensors of `Score.basis` for g key heads of width d; None where none is due."""
        return None

    def full(self, length: int) -> "Mechanism | None":
        """This mechanism with a budget at which `length` keys are all read; None where no budget does that."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The form of config.json: {"mechanism": name, field: value, ...}."""
        return {"mechanism": self.name, **asdict(self)}  # type: ignore[call-overload]


@cache
def mechanisms() -> dict[str, type[Mechanism]]:
    """Every mechanism by name, in alphabetical order: one public file each, found on disk rather than listed here."""
    found: dict[str, type[Mechanism]] = {}
    for file in sorted(iter_modules(import_module(__package__).__path__), key=lambda f: f.name):
        if file.name.startswith("_"):
            continue
        module = import_module(f"{__package__}.{file.name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Mechanism) and cls.__module__ == module.__name__:
                if cls.name != file.name:
                    raise ValueError(f"{cls.__name__}.name is {cls.name!r}, its file {file.name}.py: one word is due")
                found[cls.name] = cls
    return found


def causal_ones() -> str:
    """The mechanisms with a causal form, for messages."""
    return f"causal ones: {', '.join(name for name, cls in mechanisms().items() if cls.causal)}"


def mechanism_from_dict(given: dict[str, Any]) -> Mechanism:
    """The mechanism that `to_dict` wrote. ValueError names what is unknown and what exists."""
    rest = dict(given)
    name = rest.pop("mechanism", None)
    if name not in mechanisms():
        raise ValueError(f"unknown attention mechanism {name!r}; expected one of {', '.join(mechanisms())}")
    cls = mechanisms()[name]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if unknown := [field for field in rest if field not in known]:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return cls(**{name: _frozen(value) for name, value in rest.items()})


def _frozen(value: Any) -> Any:
    """JSON has lists only; frozen dataclasses want tuples, so that they hash and compare."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def whole(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
