"""Examples as a data set: what the model is given, beside the rows they came from; padding; text augmentation.

Augmentation is drawn by (seed, epoch, example, place) alone, so that every epoch draws anew and resuming draws the
same. Word dropping and masking: Iyyer et al., "Deep Averaging Networks", section 2.2 (word dropout),
https://aclanthology.org/P15-1162/; Xie et al., "Data Noising", https://arxiv.org/abs/1703.02573
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ...backends.draws import uniform
from ..packing import IGNORED
from .tables import Row

__all__ = ["Augmented", "Collator", "Examples"]

Feature = dict[str, Any]


@dataclass
class Examples(Dataset[Feature]):
    """features: lists of integers that the model is called with; rows: what they were made of.

    row_of    for every feature its row, where a row made several or none; None: one each.
    extra     what scoring needs of each feature and the model does not (offsets of tokens, say).
    """

    features: list[Feature]
    rows: list[Row]
    row_of: list[int] | None = None
    extra: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, n: int) -> Feature:
        return self.features[n]


class Augmented(Dataset[Feature]):
    """Training examples with tokens dropped or masked; special tokens, and those with a label to copy, stay.

    shift  the labels are the input's own tokens (decoder-only): only the prompt changes, where labels are IGNORED.
    """

    def __init__(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, dropping: float, masking: float, seed: int
    ) -> None:
        if masking and tokenizer.mask_token_id is None:
            raise ValueError("--token_masking needs a tokenizer with a mask token; use --token_dropping")
        if dropping and "start_positions" in examples[0]:
            raise ValueError("--token_dropping would move the answers that are to be found; use --token_masking")
        self.examples, self.dropping, self.masking = examples, dropping, masking
        self.mask, self.seed, self.epoch = tokenizer.mask_token_id, seed, 0
        self.special = set(tokenizer.all_special_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw others from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, n: int) -> Feature:
        feature = self.examples[n]
        ids, labels = feature["input_ids"], feature.get("labels", [])
        aligned = isinstance(labels, list) and len(labels) == len(ids) and "decoder" not in feature
        place = torch.tensor(self.epoch), torch.tensor(n), torch.arange(len(ids))
        drawn = uniform(self.seed, *place, torch.tensor(0)).tolist()
        bounds = range(len(ids))
        if "start_positions" in feature:  # the answer is what has to be read
            bounds = [n for n in bounds if not feature["start_positions"] <= n <= feature["end_positions"]]  # type: ignore[assignment]
        free = {i for i in bounds if ids[i] not in self.special and not (feature.get("own_labels") and labels[i] >= 0)}
        gone = {i for i in free if drawn[i] < self.dropping}
        if len(gone) == len(free) and free:  # something is left to read
            gone.discard(min(free))
        hidden = {i for i in free if self.dropping <= drawn[i] < self.dropping + self.masking}
        kept = [i for i in range(len(ids)) if i not in gone]
        changed = {**feature, "input_ids": [self.mask if i in hidden else ids[i] for i in kept]}
        for name in ("attention_mask", "token_type_ids", *(["labels"] if aligned else [])):
            if name in feature:
                changed[name] = [feature[name][i] for i in kept]
        return changed


class Collator:
    """Features -> a batch: lists padded to the longest, numbers stacked; all int64.

    side  "left" for prompts that are to be continued.
    """

    def __init__(self, pad: int, side: str = "right") -> None:
        self.fill = {"input_ids": pad, "labels": IGNORED}
        self.side = side

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        names = [name for name in features[0] if name not in ("own_labels", "decoder")]
        batch = {name: self._pad(name, [one[name] for one in features]) for name in names}
        if "attention_mask" not in batch:
            batch["attention_mask"] = self._pad("attention_mask", [[1] * len(one["input_ids"]) for one in features])
        return batch

    def _pad(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest, fill = max(map(len, values)), self.fill.get(name, 0)
        padded = [
            [*[fill] * (longest - len(one)), *one] if self.side == "left" else [*one, *[fill] * (longest - len(one))]
            for one in values
        ]
        return torch.tensor(padded)
