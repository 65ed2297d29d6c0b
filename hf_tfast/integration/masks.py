"""What Transformers' masks say, as one integer word per key: O(L), never L x L.

`key_row` is registered as the mask function of every `tfast` name. It returns a row [b 1 1 n] int64 with one word per
key, also where nothing is masked: the flag `is_causal` of modules is not to be trusted (decoders that only ever ran
eager attention leave it False). A word of 0 is padding. The fields of a word, from the lowest bit:

    document   20 bits   which packed document the key belongs to, from 1
    start      22 bits   tokens of this row that a cache dropped before this key (so keys in front of a gap keep 0)
    window     19 bits   the model's own sliding window, in the meaning of `Window(window=...)`; 0: none
    two-way     1 bit    the model's mask is bidirectional
    causal      1 bit    the model's mask is causal; neither bit: the row does not say, ask the module

Every word of a row repeats the last three, so that slices, expansions and moves between devices lose nothing. n may be
smaller than the number of keys: then only the first n slots of a static cache are filled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import getclosurevars
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import masking_utils

from ..attention import Mask

__all__ = ["KeyRow", "key_row", "pack_row", "read_row", "remembered"]

_DOCUMENT, _START, _WINDOW = 20, 22, 19  # bits
_TWO_WAY, _CAUSAL = 1 << 61, 1 << 62

_HARMLESS = ("allow_is_causal_skip", "allow_is_bidirectional_skip", "config", "dtype", "use_vmap")
_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")

Read = TypeVar("Read")


@dataclass(frozen=True)
class KeyRow:
    """A row of words, read: `mask` (without its causal flag), the keys it covers, the model's window and causality."""

    mask: Mask
    keys: int
    window: int | None = None
    causal: bool | None = None

    def on(self, batch: int) -> "KeyRow":
        """The same for a batch of `batch` rows, where one row was given for all."""
        if all(x is None or x.shape[0] == batch for x in (self.mask.valid, self.mask.segments)):
            return self
        rows = lambda x: x.expand(batch, -1) if x is not None and x.shape[0] != batch else x  # noqa: E731
        return replace(self, mask=replace(self.mask, valid=rows(self.mask.valid), segments=rows(self.mask.segments)))


@dataclass(frozen=True)
class _Pattern:
    """What a mask function of Transformers is made of."""

    causal: bool
    window: int | None = None
    packed: Callable[..., Tensor] | None = None


def pack_row(
    documents: Tensor, start: int | Tensor = 0, window: int | None = None, causal: bool | None = None
) -> Tensor:
    """[b n] documents (0 = padding) and [b n], [b 1] or a number of dropped tokens -> the row [b 1 1 n] int64."""
    if documents.numel() and int(documents.amax()) >= 1 << _DOCUMENT:
        raise ValueError(f"at most {(1 << _DOCUMENT) - 1} packed documents fit a row, got {int(documents.amax())}")
    words = documents.long() | (torch.as_tensor(start, device=documents.device).long() << _DOCUMENT)
    words = words | _shared(window, causal)
    return words.where(documents != 0, 0)[:, None, None]


def _shared(window: int | None, causal: bool | None) -> int:
    """What every word of a row says."""
    if window is not None and window >= 1 << _WINDOW:
        window = None  # as good as none: no row is that long
    flags = 0 if causal is None else _CAUSAL if causal else _TWO_WAY
    return ((window or 0) << (_DOCUMENT + _START)) | flags


def _whole_row(shape: tuple[int, int], start: int, window: int | None, causal: bool, device: Any) -> Tensor:
    """`pack_row` of rows [b n] of one document without padding: known without a look at data, and so read already."""
    shared = _shared(window, causal)
    row = torch.full((shape[0], 1, 1, shape[1]), 1 | (start << _DOCUMENT) | shared, device=device)
    if not row.is_inference():
        fits = window is not None and window < 1 << _WINDOW
        known = KeyRow(mask=Mask(start=start), keys=shape[1], window=window if fits else None, causal=causal)
        row._tfast_row = (row._version, known)  # type: ignore[attr-defined]
    return row


def read_row(row: Tensor) -> KeyRow:
    """The row that `pack_row` made, or plain document numbers [b 1 1 n] of any integer dtype or bool."""
    return remembered(row, "_tfast_row", lambda: _read(row[:, 0, 0].long()))


def _read(words: Tensor) -> KeyRow:
    documents = words & ((1 << _DOCUMENT) - 1)
    starts = (words >> _DOCUMENT) & ((1 << _START) - 1)
    shared = int(words.amax()) if words.numel() else 0  # window and flags are the same in all words but padding
    mask = Mask()
    if not bool((documents == 1).all()):
        packed = bool((documents > 1).any())
        mask = Mask(segments=documents) if packed else Mask(valid=documents != 0)
    if bool((starts > 0).any()):
        ahead = (starts.cumsum(-1) == 0).sum(-1)  # keys in front of the gap; rows without one have none there
        dropped = starts.amax(-1)
        mask = replace(mask, start=_number(dropped), kept=_number(ahead.where(dropped > 0, 0)))
    return KeyRow(
        mask=mask,
        keys=words.shape[-1],
        window=(shared >> (_DOCUMENT + _START)) & ((1 << _WINDOW) - 1) or None,
        causal=True if shared & _CAUSAL else False if shared & _TWO_WAY else None,
    )


def _number(rows: Tensor) -> int | Tensor:
    """[b] -> one integer where all rows agree."""
    return int(rows[0]) if bool((rows == rows[0]).all()) else rows


def remembered(tensor: Tensor, name: str, read: Callable[[], Read]) -> Read:
    """`read()`, kept on the tensor itself until it is changed in place: every layer of a forward asks the same."""
    if tensor.is_inference():  # made under torch.inference_mode: changes in place are not counted
        return read()
    known = getattr(tensor, name, None)
    if known is None or known[0] != tensor._version:
        known = (tensor._version, read())
        setattr(tensor, name, known)
    return known[1]


@torch.compiler.disable
def key_row(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """Transformers' mask interface: the row [b 1 1 n] of this forward.

    attention_mask is [b m] bool over all tokens so far; local_size repeats what mask_function says.
    ValueError for a pattern that a row cannot express.
    """
    if unknown := [name for name in options if name not in _HARMLESS and options[name] is not None]:
        raise ValueError(f"the mask argument {unknown[0]!r} is not known to hf_tfast and would be ignored")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"expected an attention mask [batch, length] or [batch, heads or 1, queries, keys], got "
            f"{tuple(attention_mask.shape)}"
        )
    pattern = _pattern(mask_function, kv_length + kv_offset)
    n = min(kv_length, int(q_offset) + q_length - kv_offset) if pattern.causal else kv_length
    reach = pattern.window if pattern.causal else None if pattern.window is None else pattern.window + 1
    window = pattern.window if reach is not None and n + kv_offset > reach else None
    whole = attention_mask is None and pattern.packed is None
    if whole or torch.compiler.is_exporting():
        if not whole:
            _assert_whole(attention_mask, pattern, batch_size, n, device)
        return _whole_row((batch_size, n), kv_offset, window, pattern.causal, device)
    start: int | Tensor = kv_offset
    documents = torch.ones(batch_size, n, dtype=torch.int64, device=device)
    if pattern.packed is not None:
        documents = _packed_documents(pattern.packed, batch_size, n, device)
    if attention_mask is not None:
        missing = max(n + kv_offset - attention_mask.shape[1], 0)
        seen = F.pad(
            attention_mask.bool(), (0, missing)
        )  # as Transformers does: what the mask does not cover is padding
        valid = seen[:, kv_offset : kv_offset + n]
        start = seen[:, :kv_offset].sum(-1, keepdim=True)
        documents = documents * valid
    return pack_row(documents, start, window, pattern.causal)


def _assert_whole(attention_mask: Tensor | None, pattern: _Pattern, batch: int, n: int, device: Any) -> None:
    """torch.export records no choice that depends on data: the program reads whole rows, and checks that they are."""
    if attention_mask is not None:
        raise ValueError(
            "torch.export cannot trace fast attention over an attention_mask, since rows are cut by where their "
            "padding lies: export without it (the program then reads full rows of that length), or export "
            "model.set_attn_implementation('sdpa'), which runs the same weights densely"
        )
    if pattern.packed is not None:  # under tracing Transformers takes any position_ids for packed documents
        last = _packed_documents(pattern.packed, batch, n, device)[:, -1]
        torch._assert_async((last == 1).all(), "position_ids restart: an exported program reads one document a row")


def _packed_documents(same: Callable[..., Tensor], batch: int, n: int, device: torch.device | str) -> Tensor:
    """[b n] document numbers from 1: a border lies where a token and the one before it do not see each other."""
    b, i = torch.arange(batch, device=device)[:, None], torch.arange(1, n, device=device)[None]
    border = ~same(b, 0, i, i - 1)
    return torch.cat([torch.ones(batch, 1, dtype=torch.int64, device=device), border.long()], -1).cumsum(-1)


def _pattern(function: Callable[..., Any], length: int) -> _Pattern:
    """Take a composed mask function apart. ValueError where it holds anything that a row of words cannot say."""
    causal, window, packed = None, None, None
    for name, part in _parts(function):
        if name in ("causal_mask_function", "bidirectional_mask_function"):
            causal = name == "causal_mask_function"
        elif name in _WINDOWS:
            window = int(getclosurevars(part).nonlocals["sliding_window"])
        elif name == "packed_sequence_mask_function":
            packed = part
        elif name != "chunked_overlay" or getclosurevars(part).nonlocals["chunk_size"] < length:
            raise ValueError(
                f"the model asks for the mask pattern {name!r}, which hf_tfast cannot express; give the mask as a "
                "dense 4-D tensor [batch, 1, queries, keys], or load this model with attn_implementation='sdpa'"
            )
    if causal is None:
        raise ValueError(
            "the model's mask function is neither causal nor bidirectional; use attn_implementation='sdpa'"
        )
    return _Pattern(causal, window, packed)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The mask functions that an intersection is made of, with the names of the functions that made them."""
    name = getattr(function, "__qualname__", repr(function)).split(".<locals>")[0]
    if getattr(function, "__module__", "") != masking_utils.__name__:
        yield f"{getattr(function, '__module__', '')}.{name}", function
    elif name == "and_masks":
        for part in getclosurevars(function).nonlocals["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":  # positions inside a document: the same pattern, document-wise
        yield from _parts(getclosurevars(function).nonlocals["mask_function"])
    else:
        yield name, function
