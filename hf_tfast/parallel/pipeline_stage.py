"""The stages of a pipeline: a TFast model from some layer to another, with names as in the whole model.

The first stage embeds tokens, the last one has the last norm and the output layer. What a process holds of a model is
what its stages hold: everything else is taken out, so that optimisers, checkpoints and counts see its own part alone.
"""

from typing import Any, cast

from torch import Tensor, nn

__all__ = ["Stage", "cut_layers", "keep_stages"]


class Layers(nn.ModuleList):
    """Some layers of a model under the numbers that they have in it; counted from 0 where they are asked for."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, n: Any) -> Any:
        return list(self._modules.values())[n]


class Through(nn.Module):
    """In the place of embeddings that another process holds: states pass."""

    def forward(self, states: Tensor, *given: Any) -> Tensor:
        return states


class Stage(nn.Module):
    """Layers first to last of a TFast model with a head. Takes token ids [b i] on the first stage, states [b i hidden]
    on the others; returns states, on the last stage logits [b i vocabulary]."""

    def __init__(self, model: Any, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last, self.layers = first, last, layers
        base = model.model
        # a model of the same class around the same modules: its forward makes masks and positions
        part = object.__new__(type(base))
        part.__dict__.update(base.__dict__)
        part._modules = dict(base._modules)
        part.layers = Layers({n: base.layers[n] for n in layers})
        if not first:
            part.embed_tokens, part.embeddings = Through(), Through()
        if not last:
            part.norm = nn.Identity()
        self.part = part
        self.head = getattr(model, "head", nn.Identity()) if last else None
        self.lm_head = model.lm_head if last else None

    def forward(self, x: Tensor, **rows: Tensor) -> Tensor:
        given: dict[str, Any] = {"input_ids" if self.first else "inputs_embeds": x, **rows}
        if self.part.config.causal:
            given["use_cache"] = False
        states = self.part(**given).last_hidden_state
        if not self.last:
            return states
        logits = cast(Any, self.lm_head)(cast(Any, self.head)(states))
        return logits.to(states.dtype)  # autocast leaves them narrower than what processes exchange


def cut_layers(layers: int, stages: int) -> list[range]:
    """Which layers each stage has, as evenly as can be, the larger ones first. ValueError for too many stages."""
    if stages > layers:
        raise ValueError(
            f"{stages} stages need as many layers, and the model has {layers}: use fewer processes or fewer stages"
        )
    size, larger = divmod(layers, stages)
    starts = [n * size + min(n, larger) for n in range(stages + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def keep_stages(model: Any, stages: list[Stage]) -> None:
    """Take out of the model what none of these stages has, in place."""
    base = model.model
    kept = [n for stage in stages for n in stage.layers]
    base.layers = Layers({n: base.layers[n] for n in kept})
    if not any(stage.first for stage in stages):
        base.embed_tokens, base.embeddings = Through(), Through()
    if not any(stage.last for stage in stages):
        base.norm = nn.Identity()
        model.lm_head = Through()
        if hasattr(model, "head"):
            model.head = Through()
