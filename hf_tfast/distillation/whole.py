"""Stage 2, the whole: the student's logits (and hidden states) match the teacher's on the same texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ._batch import aligned_labels, inner, kept_targets, model_inputs
from .cache import CachedTeacher
from .layers import Projections, layer_map, mapped_hidden_loss
from .losses import (
    DIVERGENCES,
    STATES,
    Count,
    cross_entropy,
    logits_divergence,
    top_logits,
    top_logits_divergence,
)

__all__ = ["LogitMatching", "Whole", "check_vocabularies", "shifts_labels"]

PROJECTIONS = "distillation_projections"  # a module of the student while it trains


@dataclass(frozen=True, kw_only=True)
class LogitMatching:
    """What stage 2 adds up, each with its weight.

    logits       of the divergence of the student's distribution from the teacher's.
    labels       of the cross-entropy with the labels of the data.
    hidden       of the distance of hidden states, of `layers` {student layer: teacher layer} (None: spread evenly);
                 where widths differ, projections are learned beside the student and thrown away.
    temperature, divergence, beta, chunk   as in `losses.logits_divergence`.
    top          compare the teacher's so many most likely tokens and the rest as one; None: all. A cached teacher has
                 its own number and temperature.
    vocabulary   compare the first so many tokens only: for models whose vocabularies differ by padding at the end.
    """

    logits: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    divergence: str = "forward"
    beta: float = 0.5
    top: int | None = None
    chunk: int | None = None
    hidden_kind: str = "mse"
    layers: Mapping[Any, int] | Sequence[int] | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        weights = (self.logits, self.labels, self.hidden)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights are at least 0 and one is above, got logits, labels, hidden = {weights}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"a divergence is one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if self.hidden_kind not in STATES:
            raise ValueError(f"hidden states are compared by {', '.join(STATES)}, got {self.hidden_kind!r}")
        if self.temperature <= 0:
            raise ValueError(f"the temperature must be above 0, got {self.temperature}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top compares at least 1 token, got {self.top}")


def check_vocabularies(
    student: PreTrainedModel, vocabulary: int, objective: LogitMatching, tokens: Sequence[Mapping[str, int]] = ()
) -> None:
    """ValueError unless logits of student and teacher (so many) mean the same tokens.

    tokens  the vocabularies of the student's and the teacher's tokenizers, where both are known.
    """
    if objective.logits == 0:
        return
    mine = student.config.get_text_config().vocab_size
    options = (
        "Options: make the student with the teacher's tokenizer and vocab_size; where the first N tokens are the same "
        "and the rest is padding, LogitMatching(vocabulary=N) or student.resize_token_embeddings(N); for tokens that "
        "differ, distil hidden states alone (LogitMatching(logits=0, hidden=1)) if both cut texts alike, else the "
        "teacher's own texts as training data (hf_tfast.distillation.sequences)"
    )
    if objective.vocabulary is not None:
        if not 1 <= objective.vocabulary <= min(mine, vocabulary):
            raise ValueError(
                f"vocabulary={objective.vocabulary}, but the student has {mine} tokens and the teacher {vocabulary}"
            )
    elif mine != vocabulary:
        raise ValueError(f"the student has {mine} tokens and the teacher {vocabulary}: logits do not match. {options}")
    if len(tokens) == 2:
        known = min(objective.vocabulary or mine, max(map(len, tokens)))
        words = [{n: word for word, n in each.items()} for each in tokens]
        wrong = [n for n in range(known) if words[0].get(n) != words[1].get(n)]
        if wrong:
            n = wrong[0]
            raise ValueError(
                f"token {n} is {words[0].get(n)!r} for the student and {words[1].get(n)!r} for the teacher "
                f"({len(wrong)} differ): logits do not match. {options}"
            )


class Whole:
    """Stage 2 for one student and one teacher: the losses of a batch, and the projections they need."""

    stage = "logits"

    def __init__(self, objective: LogitMatching, student: Any, teacher: PreTrainedModel | CachedTeacher) -> None:
        self.objective, self.teacher = objective, teacher
        base = inner(student)
        self.base = base
        self.shifts = shifts_labels(base)
        self.pad = getattr(base.config.get_text_config(), "pad_token_id", None)
        self.map: dict[int, int] = {}
        self.projections: Projections | None = None
        if isinstance(teacher, CachedTeacher):
            if objective.hidden:
                raise ValueError("a cached teacher has logits alone: hidden states need the teacher itself")
            for name, given, default in (("top", objective.top, None), ("temperature", objective.temperature, 1.0)):
                if given not in (default, getattr(teacher, name)):
                    raise ValueError(
                        f"{name}={given}, but the cache was made with {getattr(teacher, name)}: cache again, or leave "
                        "it out"
                    )
        if objective.hidden:
            self._project(student, base, teacher)

    def _project(self, student: Any, base: PreTrainedModel, teacher: Any) -> None:
        mine, other = (m.config.get_text_config() for m in (base, teacher))
        self.map = layer_map(self.objective.layers, mine.num_hidden_layers, other.num_hidden_layers)
        if mine.hidden_size == other.hidden_size:
            return
        if student is not base:
            raise ValueError(
                f"the student is {mine.hidden_size} wide and the teacher {other.hidden_size}: projections between "
                "widths train with the whole student, not beside LoRA"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.projections = Projections(self.map, mine.hidden_size, other.hidden_size)
        self.projections.to(base.device)

    def attach(self) -> None:
        """Let the projections train, and be saved in checkpoints, with the student."""
        if self.projections is not None:
            self.base.add_module(PROJECTIONS, self.projections)

    def detach(self) -> None:
        self.base._modules.pop(PROJECTIONS, None)

    def kept(self, batch: Mapping[str, Any]) -> Tensor:
        return kept_targets(batch, self.shifts, self.pad)

    def terms(self, model: Any, batch: Mapping[str, Any], count: Count) -> tuple[dict[str, Tensor], Any]:
        """{"logits": .., "labels": .., "hidden": ..}, weighted, where there is a weight; and the student's output."""
        o, keep = self.objective, self.kept(batch)
        states = {"output_hidden_states": True} if o.hidden else {}
        theirs: Any = self._teacher_output(batch, states) if o.logits or o.hidden else None
        mine = model(**model_inputs(self.base, batch), **states)
        found: dict[str, Tensor] = {}
        if o.logits:
            found["logits"] = o.logits * self._divergence(mine.logits, theirs, batch, keep, count)
        if o.labels:
            labels = aligned_labels(batch, self.shifts)
            if labels is None:
                raise ValueError("labels have a weight, but the data has no labels")
            found["labels"] = o.labels * cross_entropy(mine.logits, labels, count)
        if o.hidden:
            states_of = mine.hidden_states[1:], theirs.hidden_states[1:]
            distance = mapped_hidden_loss(
                states_of[0], states_of[1], self.map, keep, count, kind=o.hidden_kind, projections=self.projections
            )
            found["hidden"] = o.hidden * distance
        return found, mine

    def _teacher_output(self, batch: Mapping[str, Any], states: dict[str, bool]) -> Any:
        if isinstance(self.teacher, CachedTeacher):
            return None
        with torch.no_grad():
            return self.teacher(**model_inputs(self.teacher, batch), **states)

    def _divergence(self, z: Tensor, theirs: Any, batch: Mapping[str, Any], keep: Tensor, count: Count) -> Tensor:
        o = self.objective
        z = z if o.vocabulary is None else z[..., : o.vocabulary]
        how: dict[str, Any] = {"kind": o.divergence, "beta": o.beta, "chunk": o.chunk}
        if isinstance(self.teacher, CachedTeacher):
            return top_logits_divergence(z, self.teacher.logits(batch), keep, count, **how)
        y = theirs.logits if o.vocabulary is None else theirs.logits[..., : o.vocabulary]
        if o.top is not None:
            return top_logits_divergence(z, top_logits(y, o.top, o.temperature), keep, count, **how)
        return logits_divergence(z, y, keep, count, temperature=o.temperature, **how)


def shifts_labels(model: PreTrainedModel) -> bool:
    """Are labels those of the inputs, of which the model predicts the next? As Trainer finds out."""
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return shifts and not model.config.is_encoder_decoder
