"""Stage 1, layer by layer: every layer of the student reads what the teacher's layer reads, and matches its output.

The teacher runs once and shows the inputs and outputs of its layers. Each student layer is then given its teacher
layer's input, whatever the student's layers below it make of theirs: errors do not add up, no gradient crosses a
layer, and layers can be trained one at a time. With match="attention" a student layer ends where attention does,
before the output projection, and the rest of it is not computed. Where the student keeps the teacher's weights this
teaches its queries, keys and values to get from fast attention what dense attention gave.

Source: LoLCATs, https://arxiv.org/abs/2410.10254, section 3.2 (attention outputs); MOHAWK,
https://arxiv.org/abs/2408.10189, section 3.2 (blocks, teacher-forced inputs).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integration._modules import survey
from ._batch import inner, kept_states, model_inputs
from .layers import layer_map
from .losses import STATES, Count, attention_output_loss, hidden_loss

__all__ = ["Block", "LayerMatching", "Layerwise", "blocks_of"]

MATCHES = ("attention", "block")
# What reads an attention's output within its module, by the names that Transformers' models give it.
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "out_lin", "dense", "wo", "Wo", "proj", "o", "out", "to_out")


@dataclass(frozen=True, kw_only=True)
class LayerMatching:
    """What stage 1 matches, and what it trains.

    match          "attention": what attention gives before its output projection; "block": what the whole layer gives.
    kind           "relative", "mse" or "cosine", as in `losses.hidden_loss`.
    layers         {student layer: teacher layer}, a list, or None: spread evenly (see `layers.layer_map`).
    train          regular expressions of parameter names that are trained, None: for "attention" the parameters of the
                   attention modules up to their output projection, for "block" all of the layers. Parameters that
                   are frozen beforehand (all but LoRA's, say) stay so.
    one_at_a_time  each layer trains alone for its share of the steps, with the whole learning rate schedule: the least
                   memory. Else all layers train in every step.
    """

    match: str = "attention"
    kind: str = "relative"
    layers: Mapping[Any, int] | Sequence[int] | None = None
    train: Sequence[str] | None = None
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise ValueError(f"a layer is matched by its {' or '.join(MATCHES)}, got {self.match!r}")
        if self.kind not in STATES:
            raise ValueError(f"outputs are compared by {', '.join(STATES)}, got {self.kind!r}")


@dataclass(frozen=True)
class Block:
    """A layer of a model, its self-attention, and the projection that reads what attention gives, if it is inside."""

    path: str
    module: nn.Module
    attention: nn.Module
    attention_path: str
    projection: str | None

    @property
    def reader(self) -> nn.Module | None:
        return None if self.projection is None else self.attention.get_submodule(self.projection)


class _Enough(Exception):
    """All that was asked for has been seen."""


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The layers of a model, in order. ValueError where it has two stacks or attention outside the interface."""
    found = [f for f in survey(model).found if f.kind == "self"]
    stacks = sorted({f.stack for f in found})
    if len(stacks) != 1:
        raise ValueError(
            f"layers are matched in models with one stack of attention layers that Transformers' interface reaches; "
            f"{type(model).__name__} has {', '.join(stacks) or 'none'}: distil its logits with LogitMatching"
        )
    blocks = []
    for f in sorted(found, key=lambda f: f.layer):
        parts = f.path.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            raise ValueError(f"{f.path} belongs to no numbered layer: distil logits with LogitMatching")
        path = ".".join(parts[: number + 1])
        children = dict(f.module.named_children())
        projection = next((name for name in PROJECTIONS if name in children), None)
        blocks.append(Block(path, model.get_submodule(path), f.module, f.path, projection))
    return blocks


class Layerwise:
    """Stage 1 for one student and one teacher: which parameters train, and the losses of a batch."""

    stage = "layers"

    def __init__(self, objective: LayerMatching, student: Any, teacher: Any) -> None:
        if not isinstance(teacher, PreTrainedModel):
            raise ValueError("matching layers needs the teacher itself: cached logits hold no inputs of layers")
        self.objective, self.teacher = objective, teacher
        self.student = inner(student)
        self.blocks, self.teachers = blocks_of(self.student), blocks_of(teacher)
        self.map = layer_map(objective.layers, len(self.blocks), len(self.teachers))
        mine, other = (m.config.get_text_config().hidden_size for m in (self.student, teacher))
        if mine != other:
            raise ValueError(
                f"the student is {mine} wide and the teacher {other}: its layers cannot read the teacher's inputs; "
                "distil logits and hidden states (LogitMatching(hidden=1.0) projects them), or take an equal width"
            )
        for model, name in ((self.student, "student"), (teacher, "teacher")):
            if getattr(model, "is_gradient_checkpointing", False):
                raise ValueError(
                    f"the {name} checkpoints gradients, which matching layers cannot: one_at_a_time saves memory"
                )
        self._returns: dict[type, int | None] = {}
        self._able = {name for name, p in self.student.named_parameters() if p.requires_grad}
        self.pad = getattr(teacher.config.get_text_config(), "pad_token_id", None)

    def trained(self, layers: Sequence[int] | None = None) -> list[str]:
        """Names of the student's parameters that train, of these layers or of all. ValueError where there are none."""
        chosen = []
        for n in self.map if layers is None else layers:
            block = self.blocks[n]
            for name, _ in block.module.named_parameters():
                path = f"{block.path}.{name}"
                if path in self._able and self._trains(block, path):
                    chosen.append(path)
        if not chosen:
            raise ValueError(f"no parameter of the mapped layers matches {self.objective.train}")
        return chosen

    def _trains(self, block: Block, path: str) -> bool:
        if self.objective.train is not None:
            return any(re.search(pattern, path) for pattern in self.objective.train)
        if self.objective.match == "block":
            return True
        after = None if block.projection is None else f"{block.attention_path}.{block.projection}."
        return path.startswith(f"{block.attention_path}.") and not (after and path.startswith(after))

    def active(self, step: int, steps: int) -> list[int]:
        """The student's layers that train in this step (from 0) of so many."""
        layers = list(self.map)
        if not self.objective.one_at_a_time:
            return layers
        return [layers[min(step // self.share(steps), len(layers) - 1)]]

    def share(self, steps: int) -> int:
        """Steps that a layer trains for, where they go one at a time."""
        return max(-(-steps // len(self.map)), 1)

    def kept(self, batch: Mapping[str, Any]) -> Tensor:
        return kept_states(batch, self.pad)

    def terms(self, model: Any, batch: Mapping[str, Any], count: Count, layers: Sequence[int]) -> dict[str, Tensor]:
        """{"layer 0": loss, ...} of the given student layers, each divided by how many layers are given."""
        keep = self.kept(batch)
        wanted = {self.map[n] for n in layers}
        inputs, targets = self._teacher_states(batch, wanted)
        outputs = self._student_outputs(model, batch, {n: inputs[self.map[n]] for n in layers})
        compare = attention_output_loss if self.objective.match == "attention" else hidden_loss
        found = {}
        for n in layers:
            y, x = outputs[n], targets[self.map[n]]
            if y.shape != x.shape:
                raise ValueError(
                    f"student layer {n} gives {tuple(y.shape)} where teacher layer {self.map[n]} gives "
                    f'{tuple(x.shape)}: match="block" compares what both end in'
                )
            found[f"layer {n}"] = compare(y, x, keep, count, kind=self.objective.kind) / len(layers)
        return found

    @torch.no_grad()
    def _teacher_states(
        self, batch: Mapping[str, Any], layers: set[int]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Inputs and targets of the teacher's layers; it runs up to the last of them."""
        inputs: dict[int, Tensor] = {}
        targets: dict[int, Tensor] = {}

        def read(n: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                inputs[n] = (args[0] if args else kwargs["hidden_states"]).detach()

            return hook

        def see(n: int) -> Callable[[Tensor], None]:
            def seen(x: Tensor) -> None:
                targets[n] = x.detach()
                if len(targets) == len(layers):
                    raise _Enough

            return seen

        with ExitStack() as stack:
            for n in layers:
                block = self.teachers[n]
                stack.callback(block.module.register_forward_pre_hook(read(n), with_kwargs=True).remove)
                stack.callback(self._listen(block, see(n)))
            try:
                self.teacher.base_model(**model_inputs(self.teacher, batch))
            except _Enough:
                return inputs, targets
        raise ValueError(f"{type(self.teacher).__name__} ran, but its layers {sorted(layers - set(targets))} did not")

    def _listen(self, block: Block, seen: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call `seen` with what is matched of a block; -> how to stop that."""
        if self.objective.match == "block":
            return block.module.register_forward_hook(lambda m, args, out: seen(_first(out))).remove
        if block.reader is None:
            return block.attention.register_forward_hook(lambda m, args, out: seen(_first(out))).remove
        return block.reader.register_forward_pre_hook(lambda m, args: seen(args[0])).remove

    def _student_outputs(self, model: Any, batch: Mapping[str, Any], given: dict[int, Tensor]) -> dict[int, Tensor]:
        """What is matched of the student's layers on the given inputs. The other layers are passed by."""
        outputs: dict[int, Tensor] = {}
        if not self._returns:
            self._learn_returns(batch)
        run = self.student.base_model if model is self.student else model  # a wrapper has to see its own forward
        with self._forced(given, outputs):
            run(**model_inputs(self.student, batch))
        if len(outputs) != len(given):
            raise ValueError(
                f"{type(self.student).__name__} ran, but not its layers {sorted(set(given) - set(outputs))}"
            )
        return outputs

    def _learn_returns(self, batch: Mapping[str, Any]) -> None:
        """See, in one forward that leaves no trace, what layers of each class return: a tensor, or a tuple."""
        found: dict[type, int | None] = {}

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[type(module)] = len(out) if isinstance(out, tuple) else None

        device = self.student.device
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(torch.no_grad())
            for block in self.blocks:
                stack.callback(block.module.register_forward_hook(hook).remove)
            self.student.base_model(**model_inputs(self.student, batch))
        self._returns = found

    @contextmanager
    def _forced(self, given: dict[int, Tensor], outputs: dict[int, Tensor]) -> Iterator[None]:
        """Inside: layers with a given input read that and put what is matched into `outputs`; others do nothing."""
        with ExitStack() as stack:
            for n, block in enumerate(self.blocks):
                before = block.module.__dict__.get("forward")
                stack.callback(_put_back, block.module, before)
                run = self._layer(n, block, block.module.forward, given.get(n), outputs)
                block.module.forward = run  # type: ignore[method-assign]
            yield

    def _layer(
        self, n: int, block: Block, forward: Callable[..., Any], x: Tensor | None, outputs: dict[int, Tensor]
    ) -> Callable[..., Any]:
        kind = type(block.module)

        def seen(y: Tensor) -> None:
            outputs[n] = y
            if self.objective.match == "attention":  # nothing after it is needed
                raise _Enough

        def run(*args: Any, **kwargs: Any) -> Any:
            was = args[0] if args else kwargs["hidden_states"]
            if x is None:
                return self._as_returned(kind, was)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
            stop = self._listen(block, seen) if self.objective.match == "attention" else None
            try:
                out = forward(*args, **kwargs)
            except _Enough:
                return self._as_returned(kind, was)
            finally:
                if stop is not None:
                    stop()
            if self.objective.match == "attention":
                raise ValueError(f"{block.attention_path} was not called by its layer: match its block instead")
            seen(_first(out))
            return self._as_returned(kind, was)

        return run

    def _as_returned(self, kind: type, x: Tensor) -> Any:
        """x as a layer of this class would return it."""
        size = self._returns[kind]
        return x if size is None else (x, *[None] * (size - 1))


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
