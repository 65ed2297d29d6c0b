"""Retrieval as a measure of a model: the quick start's corpus and rankings, for a study of many ways to make it small.

Documents are whole texts of at most `length` tokens; queries are embedded by the dense model as it came. Calibration
texts are the corpus's next longest documents, without those that share a paragraph with an evaluated one.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Mechanism
from .corpus import Corpus, load_corpus
from .encoder import CHUNK, Encoder, lengthened, load_encoder
from .retrieval import Record, document_table, passage_table, rivals, tokenized

__all__ = ["Retrieval"]

PARAGRAPH = 60  # characters from which a paragraph that two documents share is no coincidence


class Retrieval:
    """An encoder (Hub id or folder; None: the default one) at `length` tokens, and how to judge what becomes of it."""

    def __init__(self, model: str | None = None, corpus: str | Path | None = None, length: int = 4096) -> None:
        self.teacher = load_encoder(model)
        self.dense = lengthened(self.teacher, length)
        self.corpus, self.length = load_corpus(corpus), length
        self.chunk = min(CHUNK, self.teacher.native)
        self.texts = [tokenized(self.teacher, document, length) for document in self.corpus.documents]
        room = self.chunk - self.teacher.special
        rows = [self.teacher.content(query)[0][:room] for query, _, _ in self.corpus.queries]
        self.asked = torch.stack([self.teacher.vectors([row])[0].cpu() for row in rows])

    def make(self) -> PreTrainedModel:
        """The dense model, anew."""
        return lengthened(self.teacher, self.length).model

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean reciprocal ranks of the right document by whole vectors, and of the right passage by late chunking."""
        found: Encoder = replace(self.dense, model=model)
        rival = next(r for r in rivals(self.teacher, self.dense, found, self.chunk, self.length) if r.key == "fast")
        record = Record(rival)
        with torch.inference_mode():
            for text in self.texts:
                start = time.perf_counter()
                reading = rival.read(text)
                record.seconds.append(time.perf_counter() - start)
                for kept, x in ((record.documents, reading.document), (record.passages, reading.passages)):
                    if x is not None:
                        kept.append(x.cpu())
        (documents,) = document_table([record], self.corpus, self.asked)
        quality = {"document MRR": documents["mrr"]}
        (passages,) = passage_table([record], self.corpus, self.texts, self.asked)
        if passages["passage"] is not None and 2 * passages["queries"] > len(self.corpus.queries):  # read by `length`
            quality["passage MRR"] = passages["passage"]["mrr"]
        return quality

    def subject(self, attention: Mechanism | None, calibration: Path | None, tokens: int) -> dict[str, Any]:
        """What a study asks for (see `compression.study.Request`)."""
        return {
            "make": self.make,
            "judge": self.judge,
            "calibration": self.calibration(calibration, tokens),
            "held_out": self.held_out(),
            "attention": attention,
            "about": {
                "model": f"{self.teacher.name}, {self.teacher.model.dtype}, at {self.length} tokens, attention in all "
                f"rows: {'dense' if attention is None else repr(attention)}.".replace("torch.", ""),
                "quality": f"MRR: mean reciprocal rank of the right one for {len(self.corpus.queries)} queries, by "
                f"vectors of {len(self.texts)} documents cut to the length (and of their passages by late chunking, "
                "where the length holds most of those asked for). Text: "
                f"{self.corpus.source}; calibration on "
                f"{'other documents of it' if calibration is None else calibration.name}.",
            },
        }

    def batch(self, text: str) -> dict[str, Tensor]:
        """One text as the model reads it, unpadded."""
        ids = self.teacher.content(text)[0][: self.length - self.teacher.special]
        return {"input_ids": torch.tensor([[*self.teacher.front, *ids, *self.teacher.back]])}

    def held_out(self) -> dict[str, Tensor]:
        """The first of the evaluated documents that fills the length, or the longest."""
        return self.batch(max(self.corpus.documents, key=lambda d: min(len(d.text), 8 * self.length)).text)

    def calibration(self, file: Path | None = None, tokens: int = 24576) -> list[dict[str, Tensor]]:
        """Batches of a text file, or of the documents after the evaluated ones. ValueError where there are none, or
        where the file holds an evaluated text."""
        texts = [file.read_text(encoding="utf-8")] if file is not None else list(self._others())
        if any(paragraph in text for text in texts for paragraph in self._paragraphs()):
            raise ValueError("the calibration text holds paragraphs of the evaluated texts: give another one")
        if file is not None:
            ids, room = self.teacher.content(texts[0])[0], self.length - self.teacher.special
            pieces: list[Any] = [ids[n : n + room] for n in range(0, min(len(ids), tokens), room)]
            front, back = self.teacher.front, self.teacher.back
            return [{"input_ids": torch.tensor([[*front, *piece, *back]])} for piece in pieces]
        found: list[dict[str, Tensor]] = []
        for text in texts:
            if sum(batch["input_ids"].numel() for batch in found) < tokens:
                found.append(self.batch(text))
        return found

    def _paragraphs(self) -> set[str]:
        every = (part.strip() for document in self.corpus.documents for part in document.text.split("\n\n"))
        return {part for part in every if len(part) >= PARAGRAPH}

    def _others(self) -> Iterator[str]:
        """Documents of Python's own corpus that are not evaluated and share no paragraph with one that is."""
        evaluated: Corpus = self.corpus
        names, paragraphs = {document.name for document in evaluated.documents}, self._paragraphs()
        for document in load_corpus(None, documents=len(names) + 64).documents:
            if document.name not in names and not any(paragraph in document.text for paragraph in paragraphs):
                yield document.text
