"""Tasks by name."""

from ._base import Task
from .answers import Answers
from .labels import SequenceLabels, TokenLabels
from .text import Dialogue, Summarization, TextTask, Translation

__all__ = ["label_task", "named_task", "text_task"]

TEXT: dict[str, type[TextTask]] = {task.name: task for task in (Translation, Summarization, Dialogue)}


def text_task(name: str, decoder_only: bool = False) -> Task:
    """translation, summarization or dialogue. ValueError for others, and for a decoder where it makes no sense."""
    if name not in TEXT:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TEXT)}")
    if decoder_only and name != Dialogue.name:
        raise ValueError(f"--decoder_only is for dialogue; {name} has a source to encode")
    return TEXT[name](decoder_only)


def label_task(kind: str) -> Task:
    """sequence or token. ValueError for others."""
    found: dict[str, type[Task]] = {task.name: task for task in (SequenceLabels, TokenLabels)}
    if kind not in found:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(found)}")
    return found[kind]()


def named_task(name: str, decoder_only: bool = False) -> Task:
    """Any task: those above and qa. ValueError for others."""
    if name in TEXT:
        return text_task(name, decoder_only)
    if name == Answers.name:
        return Answers()
    if name in (SequenceLabels.name, TokenLabels.name):
        return label_task(name)
    known = [*TEXT, SequenceLabels.name, TokenLabels.name, Answers.name]
    raise ValueError(f"unknown task {name!r}; expected one of {', '.join(known)}")
