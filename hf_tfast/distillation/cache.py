"""A teacher's logits on disk: computed once, read by as many students and epochs as one likes, without the teacher.

folder/index.json              k, temperature, vocabulary, and where the tokens of every row are
folder/shard-00000.safetensors indices [t k] int32, logs [t k] and rest [t]: `losses.TopLogits` of t tokens

A row is found by a digest of its tokens, so the order of rows, their batches and their padding may change. Rows that
the cache does not hold (masks drawn anew in every epoch, other texts) are refused. Per token it takes k * 6 + 4 bytes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..benchmarking.folder import new_folder
from ..compression._batches import evaluating
from ._batch import main_input, model_inputs
from .losses import TopLogits, top_logits

__all__ = ["CachedTeacher", "cache_logits"]

INDEX, VERSION = "index.json", 1
TENSORS = ("indices", "logs", "rest")
SHARD = 2**18  # tokens of a file, about
DTYPE = torch.float16  # of the log probabilities, which it rounds by about 0.05 %
READ = ("input_ids", "position_ids", "token_type_ids")  # what a row's logits depend on


def _digests(batch: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(digest, valid [n] bool) of every row, over its tokens without padding."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or "decoder_input_ids" in batch:
        raise ValueError("logits are cached for rows of input_ids alone: decoders and encoders, not encoder-decoders")
    mask = batch.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if valid.shape != ids.shape:
        raise ValueError(f"a cache needs an attention_mask [b n], got {tuple(valid.shape)}")
    found = []
    for n in range(len(ids)):
        digest = hashlib.sha256()
        for name in READ:
            if isinstance(batch.get(name), Tensor):
                row = batch[name].expand_as(ids)[n][valid[n]].to("cpu", torch.int64)
                digest.update(name.encode() + row.numpy().tobytes())
        found.append((digest.hexdigest()[:32], valid[n]))
    return found


def cache_logits(
    teacher: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    folder: str | Path,
    *,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    k: int = 64,
    temperature: float = 1.0,
    batch: int = 1,
    overwrite: bool = False,
) -> "CachedTeacher":
    """Run the teacher over a data set and keep its top-k logits in `folder`, which appears whole or not at all.

    collate  rows -> a batch with input_ids, as for training.
    """
    if not len(rows):
        raise ValueError("there are no rows to cache logits of")
    with new_folder(folder, overwrite=overwrite, mark=INDEX) as working, evaluating(teacher):
        index: dict[str, list[int]] = {}
        held: list[TopLogits] = []
        shards = tokens = 0
        for start in range(0, len(rows), batch):
            given = collate([rows[n] for n in range(start, min(start + batch, len(rows)))])
            given = {name: x.to(teacher.device) if isinstance(x, Tensor) else x for name, x in given.items()}
            logits = teacher(**model_inputs(teacher, given)).logits
            for n, (digest, valid) in enumerate(_digests(given)):
                if digest not in index:
                    index[digest] = [shards, tokens, int(valid.sum())]
                    held.append(top_logits(logits[n][valid], k, temperature))
                    tokens += index[digest][2]
            if tokens >= SHARD:
                _write(working, shards, held, DTYPE)
                shards, tokens, held = shards + 1, 0, []
        if held:
            _write(working, shards, held, DTYPE)
        about = {
            "version": VERSION,
            "k": min(k, logits.shape[-1]),
            "temperature": temperature,
            "vocabulary": logits.shape[-1],
            "teacher": teacher.config.name_or_path,
        }
        (working / INDEX).write_text(json.dumps({**about, "rows": index}), encoding="utf-8")
    return CachedTeacher(folder)


def _write(folder: Path, number: int, held: list[TopLogits], dtype: torch.dtype) -> None:
    joined = {
        "indices": torch.cat([x.indices for x in held]).to("cpu", torch.int32),
        "logs": torch.cat([x.logs for x in held]).to("cpu", dtype),
        "rest": torch.cat([x.rest for x in held]).to("cpu", torch.float32),
    }
    save_file({name: x.contiguous() for name, x in joined.items()}, folder / _name(number))


def _name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class CachedTeacher:
    """The logits that `cache_logits` left in a folder. ValueError for a folder that holds something else."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no {INDEX}: it is no cache of logits")
        about = json.loads(path.read_text(encoding="utf-8"))
        if about.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {about.get('version')!r}, this hf_tfast reads {VERSION}: cache again"
            )
        self.rows: dict[str, list[int]] = about["rows"]
        self.k, self.temperature, self.vocabulary = about["k"], about["temperature"], about["vocabulary"]
        self.top = self.k
        self._files: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to other processes

    def logits(self, batch: Mapping[str, Any]) -> TopLogits:
        """TopLogits [b n k] of a batch; padding holds zeros. ValueError names a row that is not in the cache."""
        ids = main_input(batch)
        shape = tuple(ids.shape[:2])
        found = TopLogits(
            torch.zeros(*shape, self.k, dtype=torch.long, device=ids.device),
            torch.zeros(*shape, self.k, device=ids.device),
            torch.zeros(shape, device=ids.device),
            self.temperature,
        )
        for n, (digest, valid) in enumerate(_digests(batch)):
            if digest not in self.rows:
                raise ValueError(
                    f"row {n} of the batch is not among the {len(self.rows)} rows of {self.folder}: the texts, their "
                    "tokens or their cutting changed (masks drawn anew in every epoch cannot be cached); cache again"
                )
            shard, start, size = self.rows[digest]
            for name, x in zip(TENSORS, (found.indices, found.logs, found.rest), strict=True):
                x[n, valid] = self._open(shard).get_slice(name)[start : start + size].to(ids.device, x.dtype)
        return found

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / _name(shard), framework="pt")
        return self._files[shard]
