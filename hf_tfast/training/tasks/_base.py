"""What a task is: which columns it reads, which head it trains, how it is scored."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from .arguments import TaskDataArguments
from .examples import Examples
from .tables import Row

__all__ = ["Task"]


class Task:
    """Subclasses say what differs; objects may be made with options of their own.

    name       as in --task
    needed     columns (roles) of every row
    kind       of `objective`: tokens, next, class or span
    metrics    names in hf_tfast.metrics; shown: their results that stand in tables
    best       the validation metric whose best checkpoint is kept; greater: is more of it better?
    generates  is the answer a text that the model makes?
    auto       the Auto class that loads a pretrained model for this; ours: the TFast class that begins at random
    unrolls    a column that makes several examples of a row, where there is one
    """

    name: ClassVar[str]
    needed: tuple[str, ...] = ()
    kind: str = "class"
    metrics: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ()
    best: ClassVar[str] = "loss"
    greater: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    unrolls: ClassVar[str | None] = None
    auto: str = ""
    ours: str = ""
    decoder_only: bool = False
    labels: list[str] | None = None

    def unroll(self, rows: Sequence[Row], data: TaskDataArguments) -> list[Row]:
        """Rows as `needed` names them, made from rows with the column `unrolls`."""
        raise NotImplementedError

    def learn_labels(self, rows: Sequence[Row], data: TaskDataArguments) -> None:
        """Find the classes in the training rows. ValueError where there are none or one."""

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        """What a tokenizer is learned from."""
        raise NotImplementedError

    def examples(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: TaskDataArguments, config: Any
    ) -> Examples:
        """Rows -> what the model is given. ValueError for columns that cannot be used."""
        raise NotImplementedError

    def score_texts(self, made: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """Metrics of generated texts."""
        raise NotImplementedError

    def score(self, predictions: Any, examples: Examples) -> dict[str, float]:
        """Metrics of logits as Trainer gathers them."""
        raise NotImplementedError

    def answers(self, predictions: Any, examples: Examples) -> list[Any]:
        """What the logits say of every row."""
        raise NotImplementedError
