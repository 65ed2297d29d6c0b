"""Sequence parallelism for fast attention: every rank of a group holds a slice of the sequence and nothing else of it.

    with SequenceParallel(model, group) as shared:
        loss = shared.loss(batch)          # the whole batch, the same on all ranks; its slice is taken here
        loss.backward()
        shared.reduce_gradients()          # or let DistributedDataParallel do it, see docs/sequence_parallel.md

Loss and gradients are those of one process, up to rounding. Window exchanges halos, Nystrom landmarks, Performer
running states: what crosses a border does not grow with the sequence. Other mechanisms raise.
"""

import inspect
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from ..attention import Mechanism
from ..integration._basis import is_causal
from ..integration._modules import survey
from ..integration._sequence import sequence_of, set_sequence
from ..integration._stamps import NAME, stamp_of
from ..integration.interface import default_mechanism
from ..integration.masks import pack_row
from .sequence_attention import SharedSequence, check_mechanism
from .sequence_wire import GroupWire, Wire

__all__ = ["SequenceParallel", "shard_sequence", "token_loss"]

IGNORED = -100  # a label that the loss leaves out
PER_TOKEN = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification", "Model")
TAKEN = ("input_ids", "inputs_embeds", "token_type_ids", "attention_mask", "position_ids", "labels")
BUCKET = 2**23  # numbers of gradients that are summed at a time
_READING = threading.Lock()  # simulated ranks are threads, and Python's parser of sources is not safe among them
MIXERS = (nn.Conv1d, nn.Conv2d, nn.RNNBase)


class SequenceParallel:
    """The sequence of `model` over the ranks of `group`, from now until `close` or the end of the `with` block.

    group   of torch.distributed; None: all processes. A Wire is taken as it is.
    Raises  ValueError where a layer runs a mechanism without an exchange or attention that is not ours, for models
            that mix tokens otherwise (convolutions, recurrences, cross-attention) or whose outputs are not per token.
    """

    def __init__(self, model: PreTrainedModel, group: Any = None) -> None:
        self.model = model
        with _READING:
            self.attention = _attention_of(model)
        if any(sequence_of(module) is not None for module in self.attention):
            raise ValueError("the sequence of this model is already shared; close that first")
        self.wire: Wire = group if isinstance(group, Wire) else GroupWire(group)
        self.causal = _direction(model, self.attention)
        self.options = {"use_cache": False} if self.causal else {}
        self.shared = SharedSequence(self.wire)
        self.resume()

    def __enter__(self) -> "SequenceParallel":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Every process runs whole sequences again."""
        for module in self.attention:
            set_sequence(module, None)

    pause = close

    def resume(self) -> None:
        """Undo `pause`."""
        for module in self.attention:
            set_sequence(module, self.shared)

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's slice of a whole batch, as the model takes it; see `shard_sequence`."""
        return shard_sequence(
            batch, self.wire.rank, self.wire.size, causal=self.causal, counts_tokens=_counts_tokens(self.model)
        )

    def loss(self, batch: dict[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        """The mean loss of all labels of the whole batch, on every rank; its gradient is this rank's part.

        num_items  divides the sum of losses instead of the number of labels in this batch: for gradient accumulation.
        """
        mine = self.shard(batch)
        if "labels" not in mine:
            raise ValueError("there are no labels in the batch, so there is no loss")
        labels = mine.pop("labels")
        mine.pop("shift_labels", None)
        own = token_loss(self.model(**mine, **self.options).logits, labels)
        told = torch.stack([own.detach().double(), (labels != IGNORED).sum().double()])
        every, count = self.wire.reduce(told).unbind()
        count = count if num_items is None else torch.as_tensor(num_items, device=count.device).double()
        own = own / count.to(own.dtype)
        return own + ((every / count).to(own.dtype) - own).detach()

    @torch.no_grad()
    def reduce_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Sum the gradients of all ranks, after the last backward pass of a step. Not under DDP, which does it too."""
        chosen = self.model.parameters() if parameters is None else parameters
        by_kind: dict[Any, list[nn.Parameter]] = {}
        for p in chosen:
            if p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                by_kind.setdefault((p.grad.dtype, p.grad.device), []).append(p)
        for group in by_kind.values():
            while group:
                bucket, size = [group.pop(0)], 0
                while group and (size := size + bucket[-1].numel()) < BUCKET:
                    bucket.append(group.pop(0))
                summed = self.wire.reduce(torch.cat([_grad(p).flatten() for p in bucket]))
                for p, part in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
                    _grad(p).copy_(part.view_as(p))


def shard_sequence(
    batch: dict[str, Any], rank: int, size: int, *, causal: bool, counts_tokens: bool = False
) -> dict[str, Any]:
    """The slice of a whole batch that `rank` of `size` holds, ready for a model under SequenceParallel.

    batch          input_ids [b L] or inputs_embeds [b L hidden]; attention_mask [b L], position_ids [b L] (which
                   restart where packed documents begin), token_type_ids [b L], labels [b L], each if there is one.
    causal         labels are shifted: the last token of a slice predicts the first one of the next rank's slice.
    counts_tokens  without position_ids, positions count tokens that are not padding, as TFast models do; else slots.
    -> the same names, L / size slots each: attention_mask as the row of words that hf_tfast reads, with documents
    numbered along the whole row; labels [b n] already shifted, under labels and shift_labels.
    ValueError where L is not a multiple of size, naming the length to pad to, and for other keys.
    """
    if unknown := [name for name in batch if name not in TAKEN]:
        raise ValueError(
            f"it is not known how to cut {unknown[0]!r} of the batch along the sequence; known are {', '.join(TAKEN)}"
        )
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("the batch has neither input_ids nor inputs_embeds")
    b, length = tokens.shape[:2]
    if length % size:
        raise ValueError(
            f"a sequence of {length} tokens cannot be cut evenly over {size} ranks: pad the batch to "
            f"{-(-length // size) * size} tokens (attention_mask 0, labels {IGNORED})"
        )
    valid = batch.get("attention_mask")
    if valid is not None and valid.shape != (b, length):
        raise ValueError(f"expected an attention_mask [batch, length] = {(b, length)}, got {tuple(valid.shape)}")
    positions = batch.get("position_ids")
    documents = torch.ones(b, length, dtype=torch.int64, device=tokens.device)
    if positions is not None:
        positions = positions.expand(b, -1)
        documents[:, 1:] += (positions.diff(dim=-1) != 1).cumsum(-1)
    elif valid is not None and counts_tokens:
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    else:
        positions = torch.arange(length, device=tokens.device).expand(b, -1)
    if valid is not None:
        documents = documents * valid.bool()  # what padding's own positions say does not count
    at = slice(rank * length // size, (rank + 1) * length // size)
    along = ("input_ids", "inputs_embeds", "token_type_ids")
    found: dict[str, Any] = {name: batch[name][:, at] for name in along if name in batch}
    found["position_ids"] = positions[:, at].contiguous()
    found["attention_mask"] = pack_row(documents[:, at].contiguous())
    if batch.get("labels") is not None:
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:] if causal else batch["labels"]
        found["labels"] = found["shift_labels"] = labels[:, at].contiguous()
    return found


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy of logits [b n vocabulary] against labels [b n], in at least fp32; -100 is left out."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _grad(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        raise ValueError("a parameter lost its gradient while gradients were summed")
    return p.grad


def _counts_tokens(model: PreTrainedModel) -> bool:
    return str(getattr(model.config, "model_type", "")).startswith(NAME)


def _attention_of(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of the model. ValueError, naming the reason, where it cannot be cut along the sequence."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a Transformers model, got {type(model).__name__}; unwrap it first")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder and a decoder: cross-attention has no sequence-parallel form")
    if not name.endswith(PER_TOKEN):
        raise ValueError(
            f"{name} may pool over the sequence, of which a rank holds a slice; models whose outputs are per token: "
            f"{', '.join(f'*{end}' for end in PER_TOKEN)}"
        )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError("output_router_logits=True adds a loss over all tokens of a sequence; switch it off")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids: a slice would begin at position 0 on every rank")
    if getattr(model.config, "nystrom_kernel", None) is not None:
        raise ValueError("nystrom_kernel: the convolution of values reads its neighbours; only attention is exchanged")
    if mixer := next((path for path, module in model.named_modules() if isinstance(module, MIXERS)), None):
        raise ValueError(f"{mixer} ({type(model.get_submodule(mixer)).__name__}) mixes tokens outside attention")
    found = survey(model)
    outside = [line for lines in found.outside.values() for line in lines]
    if outside or not found.found:
        raise ValueError(f"{name} has attention that hf_tfast does not run: {outside[0] if outside else 'all of it'}")
    for f in found.found:
        if f.kind != "self":
            raise ValueError(f"{f.path} is cross-attention, which has no sequence-parallel form")
        check_mechanism(_mechanism(f.module, f.path), f.path)
    return [f.module for f in found.found]


def _mechanism(module: nn.Module, path: str) -> Mechanism:
    config: Any = getattr(module, "config", None)
    implementation = str(getattr(config, "_attn_implementation", None))
    stamp = stamp_of(module)
    if implementation == NAME and stamp is not None:
        return stamp.mechanism
    if implementation.startswith(f"{NAME}_"):
        return default_mechanism(implementation)
    raise ValueError(
        f"{path} runs attn_implementation={implementation!r}, which knows nothing of the other ranks: give the model "
        "a plan (apply_plan) or set 'tfast_window'"
    )


def _direction(model: PreTrainedModel, attention: list[nn.Module]) -> bool:
    """Is the model causal? Its modules say so, and must agree with what it is made for."""
    directions = {is_causal(module) for module in attention}
    if len(directions) > 1:
        raise ValueError(f"{type(model).__name__} has causal and bidirectional layers; it cannot be cut")
    causal = directions.pop()
    if causal != type(model).__name__.endswith(PER_TOKEN[:2]) and not type(model).__name__.endswith(PER_TOKEN[3:]):
        raise ValueError(
            f"{type(model).__name__} and its attention modules do not agree on whether it is causal "
            f"(they say is_causal={causal})"
        )
    return causal
