"""From arguments to packed rows: texts, their split, the tokenizer, and a report of what became of every token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..benchmarking.folder import new_folder
from .arguments import BYTES, LEARNED, DataArguments, PretrainingArguments
from .evaluation import Evaluation
from .masking import MaskedRows
from .occurrences import UNIT_OF_BYTES
from .packing import Packed, PackedRows, pack
from .sources import Document, documents, hub_documents, shuffled, split_documents
from .tokens import byte_tokenizer, encode, known_tokenizer, learned_tokenizer, token_bytes


@dataclass(frozen=True)
class Data:
    """Everything that a model meets: the same for all models of a comparison."""

    train: PackedRows
    evaluation: Evaluation
    tokenizer: PreTrainedTokenizerBase
    sample: str  # the beginning of a held-out document
    report: dict[str, Any]


def prepare(data: DataArguments, args: PretrainingArguments, folder: Path, two_way: bool) -> Data:
    """Read, split, tokenise and pack. The tokenizer is kept in `folder`, and taken from there when resuming.

    ValueError for texts that cannot be read or split, and where they do not fill a step of training.
    """
    train, held = split(data, args.seed)
    with args.main_process_first(local=False, desc="tokenizer"):
        tokenizer = _tokenizer(data, train, folder / "tokenizer", two_way)
    packed = [
        pack(encode(tokenizer, [d.text for d in part]), data.length, tokenizer.pad_token_id) for part in (train, held)
    ]
    ranks = args.world_size if args.layout.plain else args.layout.data_ranks
    step = args.train_batch_size * args.gradient_accumulation_steps * ranks
    if len(packed[0].ids) < step:
        raise ValueError(
            f"the training texts make {len(packed[0].ids)} sequences of {data.length} tokens, and one step takes "
            f"{step}: give more text, a shorter --length or a smaller --per_device_train_batch_size"
        )
    evaluated = packed[1].first(data.validation_sequences)
    train_rows, held_rows = PackedRows(packed[0]), PackedRows(evaluated)
    if two_way:
        train_rows = MaskedRows(packed[0], tokenizer, args.masked_share, args.seed)
        held_rows = MaskedRows(evaluated, tokenizer, args.masked_share, args.seed + 1)
    unit = data.unit or (UNIT_OF_BYTES if data.tokenizer == BYTES else 1)
    sizes = token_bytes(tokenizer) if _says_bytes(data) else None
    evaluation = Evaluation(held_rows, data.far, unit, sizes, args.per_device_eval_batch_size)
    report = {
        "train": _report(train, packed[0]),
        "validation": {**_report(held, packed[1]), "evaluated_sequences": len(evaluated.ids)},
        "vocabulary": len(tokenizer),
        "length": data.length,
        "far": data.far,
        "unit": unit,
        "digest": _digest(packed),
    }
    return Data(train_rows, evaluation, tokenizer, held[0].text[:400], report)


def split(data: DataArguments, seed: int) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each in an order drawn from the seed."""
    if data.dataset is not None:
        found = hub_documents(data.dataset, data.dataset_config, data.dataset_split, data.text_column)
    else:
        found = documents(data.text)
    if not data.validation_text:
        return split_documents(found, data.validation_share, seed)
    held = documents(data.validation_text)
    names = {document.name for document in held}
    train = [document for document in found if document.name not in names]
    for part, option in ((train, "--text"), (held, "--validation_text")):
        if not any(document.text for document in part):
            raise ValueError(f"{option} holds no text that the other option does not hold too")
    return shuffled(train, seed), shuffled(held, seed)


def _tokenizer(data: DataArguments, train: Sequence[Document], kept: Path, two_way: bool) -> PreTrainedTokenizerBase:
    if kept.is_dir():  # of the run that is resumed, or saved by the first process a moment ago
        return known_tokenizer(kept)
    if data.tokenizer == BYTES:
        made: PreTrainedTokenizerBase = byte_tokenizer(data.length, two_way)
    elif data.tokenizer == LEARNED:
        texts = (document.text for document in train)
        made = learned_tokenizer(texts, data.vocab_size, data.length, two_way)
    else:
        made = known_tokenizer(data.tokenizer)
    with new_folder(kept, mark="tokenizer_config.json") as working:
        made.save_pretrained(working)
    return known_tokenizer(kept)


def _says_bytes(data: DataArguments) -> bool:
    """Ours are byte-level; of a foreign tokenizer nobody knows, so bits per byte are left out."""
    return data.tokenizer in (BYTES, LEARNED)


def _report(part: Sequence[Document], packed: Packed) -> dict[str, int]:
    characters = sum(len(document.text) for document in part)
    return {"characters": characters, "bytes": sum(len(d.text.encode()) for d in part), **packed.report.to_dict()}


def _digest(packed: Sequence[Packed]) -> str:
    """Two runs with one digest saw the same tokens in the same sequences."""
    digest = hashlib.sha256()
    for part in packed:
        digest.update(part.ids.numpy().tobytes())
        digest.update(part.positions.numpy().tobytes())
    return digest.hexdigest()[:16]
