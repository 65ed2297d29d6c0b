"""A converted model and what it was made from, in one: either can be put in place, to be compared in turns."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..attention.dense import Dense
from ..feed_forward._fused import FusedInt8
from ..integration._stamps import set_stamp, stamped_modules

__all__ = ["Twin"]


class Twin:
    """`before` are the modules of the dense model by path. `changed`: the paths at which conversion put others.
    Modules in `own` run what the model's own config says, in both."""

    def __init__(self, model: PreTrainedModel, before: dict[str, nn.Module], own: Collection[nn.Module] = ()) -> None:
        self.model = model
        after = dict(model.named_modules())
        other = {path for path in {**before, **after} if before.get(path) is not after.get(path)}
        self.changed = sorted(path for path in other if not any(above in other for above in _above(path)))
        self._before = {path: before.get(path) for path in self.changed}
        self._after = {path: after.get(path) for path in self.changed}
        self._stamps = [each for each in stamped_modules(model) if each[0] not in own]

    def check(self, allowed: Iterable[str], types: dict[str, type]) -> None:
        """ValueError where a module was replaced, added or taken away that the plan does not name.

        types   of the dense model's modules: the owner of a planned layer may have gained a forward, no other.
        """
        known = set(allowed)
        owners = {path.rpartition(".")[0] for path in known}
        for path, module in self.model.named_modules():
            kept = path in types and path not in self.changed and not set(_above(path)) & known
            if kept and type(module) is not types[path] and not (path in owners and isinstance(module, FusedInt8)):
                raise ValueError(f"conversion made {path} a {type(module).__name__}, which the plan does not name")
        if stray := [path for path in self.changed if path not in known]:
            was, now = (type(modules[stray[0]]).__name__ for modules in (self._before, self._after))
            raise ValueError(
                f"conversion changed {stray[0]} from {was} to {now}, which the plan does not name "
                f"({len(stray)} in all)"
            )

    def dense(self) -> None:
        """Put the dense feed-forwards and dense attention in place."""
        self._put(self._before)
        for module, stamp in self._stamps:
            set_stamp(module, replace(stamp, mechanism=Dense()))

    def converted(self) -> None:
        self._put(self._after)
        for module, stamp in self._stamps:
            set_stamp(module, stamp)

    def _put(self, modules: dict[str, nn.Module | None]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            owner = self.model.get_submodule(parent)
            if module is None:
                owner._modules.pop(name, None)
            else:
                owner._modules[name] = module


def _above(path: str) -> list[str]:
    """Every module around a path: "a.b.c" -> ["a", "a.b"]."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]
