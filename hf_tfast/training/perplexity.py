"""Perplexity as a measure of a causal model that a recipe has trained, for a study of ways to make it small.

The texts are those of its training: calibration reads what it was trained on, the judge what was held out of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.modeling_tfast import TFastForCausalLM
from .arguments import BYTES, LEARNED, DataArguments
from .data import split
from .evaluation import Evaluation
from .packing import PackedRows, collate, pack
from .tokens import encode, known_tokenizer, token_bytes

__all__ = ["Perplexity"]

ROWS = 4  # sequences of a calibration batch


class Perplexity:
    """A model that `recipes/pretrain_clm.py` has saved. `folder` holds model/; arguments.json and tokenizer/ stand
    there too, or one above where several were compared.

    ValueError for a folder that holds no such training.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        homes = [home for home in (self.folder, self.folder.parent) if (home / "arguments.json").is_file()]
        if not homes or not (self.folder / "model" / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no trained model: expected model/ and arguments.json as recipes/pretrain_clm.py "
                "writes them (of a comparison, the folder of one model)"
            )
        settings = json.loads((homes[0] / "arguments.json").read_text(encoding="utf-8"))
        if settings["two_way"]:
            raise ValueError(f"{folder} holds a model of masked language modelling, which has no perplexity of texts")
        data = DataArguments(**settings["data"])
        self.tokenizer = known_tokenizer(homes[0] / "tokenizer")
        self.length = data.length
        self.train, held = split(data, settings["training"]["seed"])
        packed = pack(encode(self.tokenizer, [d.text for d in held]), data.length, self.tokenizer.pad_token_id)
        self.rows = PackedRows(packed.first(data.validation_sequences))
        sizes = token_bytes(self.tokenizer) if data.tokenizer in (BYTES, LEARNED) else None
        self.evaluation = Evaluation(self.rows, data.far, data.unit or 1, sizes)

    def make(self) -> PreTrainedModel:
        """The trained model, anew."""
        return TFastForCausalLM.from_pretrained(self.folder / "model")

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        """On the held-out texts."""
        found = self.evaluation.sums(model).metrics()
        return {"perplexity": found["eval_perplexity"]}

    def held_out(self) -> dict[str, Tensor]:
        """Of the held-out texts, what errors and times are measured on."""
        return self._batch(self.rows, [0])

    def calibration(self, tokens: int = 65536) -> list[dict[str, Tensor]]:
        """Batches of the texts that the model was trained on."""
        wanted, texts = tokens // self.length + 1, list[str]()
        for document in self.train:
            texts.append(document.text)
            if sum(map(len, texts)) > 8 * wanted * self.length:
                break
        packed = pack(encode(self.tokenizer, texts), self.length, self.tokenizer.pad_token_id)
        full = PackedRows(packed.first(min(wanted, max(1, len(packed.ids) - 1))))
        order = torch.arange(len(full)).split(ROWS)
        return [self._batch(full, part.tolist()) for part in order]

    def subject(self, tokens: int) -> dict[str, Any]:
        """What a study asks for (see `compression.study.Request`)."""
        return {
            "make": self.make,
            "judge": self.judge,
            "calibration": self.calibration(tokens),
            "held_out": self.held_out(),
            "lower": ("perplexity",),
            "about": {
                "model": f"The causal model of {self.folder}, float32, sequences of {self.length} tokens.",
                "quality": f"Perplexity of {len(self.rows)} sequences of texts held out of its training; calibration "
                "on those that it was trained on.",
            },
        }

    @staticmethod
    def _batch(rows: PackedRows, which: list[int]) -> dict[str, Any]:
        batch = collate([rows[n] for n in which])
        del batch["labels"]
        return batch
