"""Which layer of the teacher each layer of the student learns from, and projections between widths."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .losses import Count, hidden_loss

__all__ = ["Projections", "layer_map", "mapped_hidden_loss"]


def layer_map(given: Mapping[Any, int] | Sequence[int] | None, students: int, teachers: int) -> dict[int, int]:
    """{student layer: teacher layer}, from a dict of some layers, a list of one per student layer, or None.

    None spreads the student's layers evenly, the last one upon the teacher's last: 2 of 6 learn from 2 and 5.
    ValueError for layers that do not exist.
    """
    if given is None:
        if not 1 <= students <= teachers:
            raise ValueError(
                f"{students} student layers cannot be spread over {teachers} teacher layers; give a layer map"
            )
        return {n: (n + 1) * teachers // students - 1 for n in range(students)}
    if isinstance(given, Mapping):
        try:
            found = {int(student): int(teacher) for student, teacher in given.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"a layer map is {{student layer: teacher layer}}, got {dict(given)!r}") from error
    else:
        if len(given) != students:
            raise ValueError(
                f"a layer map as a list names one teacher layer for each of {students}, got {list(given)}"
            )
        found = {n: int(teacher) for n, teacher in enumerate(given)}
    if not found:
        raise ValueError("the layer map is empty: name at least one layer")
    for whose, count, layers in (("student", students, found.keys()), ("teacher", teachers, found.values())):
        wrong = sorted(layer for layer in layers if not 0 <= layer < count)
        if wrong:
            raise ValueError(f"the layer map names {whose} layer {wrong[0]}, but there are 0 to {count - 1}")
    return found


class Projections(nn.ModuleDict):
    """One linear map [student width -> teacher width] for every mapped layer; the identity where widths are equal."""

    def __init__(self, layers: Mapping[int, int], student: int, teacher: int) -> None:
        super().__init__(
            {} if student == teacher else {str(n): nn.Linear(student, teacher, bias=False) for n in layers}
        )

    def project(self, layer: int, states: Tensor) -> Tensor:
        """States [.. student] of a student's layer -> [.. teacher]"""
        return self[str(layer)](states) if len(self) else states


def mapped_hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    layers: Mapping[int, int],
    keep: Tensor | None = None,
    count: Count = None,
    *,
    kind: str = "mse",
    projections: Projections | None = None,
) -> Tensor:
    """Mean of `hidden_loss` over the layers of a map. States [b n d] of every layer, without those of embeddings."""
    losses = []
    for n, m in layers.items():
        states = student[n] if projections is None else projections.project(n, student[n])
        if states.shape[-1] != teacher[m].shape[-1]:
            raise ValueError(
                f"student layer {n} is {states.shape[-1]} wide and teacher layer {m} {teacher[m].shape[-1]}: give "
                "Projections"
            )
        losses.append(hidden_loss(states, teacher[m], keep, count, kind=kind))
    return sum(losses[1:], losses[0]) / len(losses)
