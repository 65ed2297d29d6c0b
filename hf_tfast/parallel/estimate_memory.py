"""Bytes that a training step keeps on one GPU, operation by operation.

What a layer keeps is what autograd saves for the backward pass, so it follows from the operations of a layer, in the
order in which they stand in its code. Nothing here was fitted. Dropout is taken to be off: its masks would add a byte
a number.
"""

from dataclasses import dataclass
from math import ceil

from ..attention import Mechanism
from ..attention.dense import Dense
from ..attention.nystrom import Nystrom
from ..attention.performer import Performer
from ..attention.window import Window
from .estimate_model import CHUNK, KNOWN, Sizes

__all__ = ["WIDE", "Part", "activations", "chained", "kept_of_layer", "of_ends"]

WIDE = 4  # bytes of a number in fp32: residuals, norms and the loss, under autocast too


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one GPU computes at a time: rows of `tokens` each, one after the other.

    rows        of a step, on this GPU.
    halo        keys and values of neighbours that a layer has beside its own.
    tensor      processes that share every layer.
    stages      of the pipeline; the first one has as many rows under way at a time.
    narrow      bytes of a number that matrices multiply with: 2 under autocast, 4 without.
    fused_norm  is torch's rms_norm one operation, as on GPUs? On CPUs it is a chain of them.
    """

    rows: int
    tokens: float
    halo: int = 0
    tensor: int = 1
    stages: int = 1
    narrow: int = 2
    fused_norm: bool = True
    checkpointing: bool = False


def chained(sizes: Sizes, fused_norm: bool) -> bool:
    """Is a norm a chain of operations, each of which keeps what it needs?"""
    return sizes.norm == "rms_chain" or (sizes.norm == "rms" and not fused_norm)


def kept_of_layer(sizes: Sizes, mechanism: Mechanism, part: Part) -> dict[str, tuple[float, float]]:
    """{what: bytes of a token in one layer that every process of a tensor layout keeps whole, and cut among them}."""
    hidden, heads, groups = sizes.hidden, sizes.heads * sizes.width, sizes.groups * sizes.width
    narrow = part.narrow
    readers = sizes.readers if narrow < WIDE else 2
    return {
        # the sums of all that came before: norms need them again
        "inputs of norms": (2 * hidden * WIDE, 0),
        # x / rms(x), which the gradient of a norm's weights is a product with
        "normalised": (2 * hidden * WIDE if chained(sizes, part.fused_norm) else 0, 0),
        "statistics of norms": (2 * WIDE * (2 if sizes.norm == "layer" else 1), 0),
        # the gradient of a matrix is a product with what it read; in fp32 all that read a norm's output share one
        # tensor, under autocast each makes a narrow copy of its own
        "inputs of matrices": (readers * hidden * narrow, 0),
        # rotated queries and keys, and values: attention computes its weights again from them
        "queries, keys, values": (0, (heads + 2 * groups) * narrow),
        "attention": (0, workspace(sizes, mechanism)),
        # what the matrix behind attention read
        "outputs of attention": (0, heads * narrow),
        # gated: the activation's input and output, the other half, and their product; else the first two
        "feed-forward": (0, (4 if sizes.gated else 2) * sizes.inner * narrow),
    }  # fmt: skip


def workspace(sizes: Sizes, mechanism: Mechanism) -> float:
    """Bytes that attention itself keeps, per token and layer. ValueError for mechanisms without a formula."""
    number = 4.0 * sizes.heads  # one of fp32 for every query and head
    if isinstance(mechanism, Window):
        return 0.0  # weights and their sums are computed again
    if isinstance(mechanism, Dense | Nystrom):
        return number  # sums of weights; what Nystrom's landmarks keep does not grow with the tokens
    if isinstance(mechanism, Performer):  # the sums, and a state for every chunk
        return number * (1 + (mechanism.features * (sizes.width + 1) / CHUNK if sizes.causal else 0))
    raise ValueError(f"there is no formula for {mechanism.name}; there are formulas for {KNOWN}")


def activations(sizes: Sizes, mechanism: Mechanism, part: Part) -> float:
    """Bytes at the fullest moment of a backward pass: what was kept, and what the pass adds where it begins."""
    return max(of_ends(sizes, mechanism, part))


def of_ends(sizes: Sizes, mechanism: Mechanism, part: Part) -> tuple[float, float]:
    """`activations` of the first and of the last stage of a pipeline; without one, twice the same."""
    sums = [sum(kept) for kept in zip(*kept_of_layer(sizes, mechanism, part).values(), strict=True)]
    layer = part.tokens * (sums[0] + sums[1] / part.tensor)
    layer += 2 * part.halo * sizes.groups * sizes.width * part.narrow / part.tensor
    layers = ceil(sizes.layers / part.stages)
    # tables of rotations for all layers; under autocast narrow weights too, which their matrices keep
    once = part.tokens * (2 * sizes.width * WIDE if sizes.rotary else 0)
    copies = sizes.layer * layers * part.narrow / part.tensor if part.narrow < WIDE else 0.0
    between = _within_layer(sizes, part)
    moments = _ends(sizes, part)
    if part.checkpointing:  # of a layer its input alone, but for the layer that is computed again
        held = layers * part.tokens * sizes.hidden * WIDE
        forward = held + moments["scores"] + copies  # the copies go when the forward pass ends
        most = once + max(forward, held + moments["loss"], held + layer + between + copies / layers)
        return most, most
    kept = layers * layer + copies
    if part.stages == 1:
        most = once + kept + max(*moments.values(), between)
        return most, most
    # a row's states as they came in (received into a place of its own) and went out, and its tables
    underway = min(part.stages, part.rows)
    border = part.tokens * sizes.hidden * WIDE
    first = underway * (layers * layer + 2 * border + once) + copies + between
    last_layers = sizes.layers // part.stages
    outputs = part.tokens * sizes.vocabulary * part.narrow  # of a stage are held until its backward pass
    last = last_layers * (layer + copies / layers) + once + border + outputs + max(*moments.values(), between)
    return first, last


def _within_layer(sizes: Sizes, part: Part) -> float:
    """Bytes that come on top in the last layer's feed-forward, where its product has gone: the gradients of that, of
    both halves, and of the residual; and one matrix's gradient, before it is added to that of earlier rows."""
    cut = (2 if sizes.gated else 1) * sizes.inner * part.narrow / part.tensor
    return part.tokens * (cut + sizes.hidden * WIDE) + sizes.inner * sizes.hidden * WIDE / part.tensor


def _ends(sizes: Sizes, part: Part) -> dict[str, float]:
    """Bytes behind the last layer at three moments: the last norm and the output layer."""
    chain = chained(sizes, part.fused_norm)
    state = sizes.hidden * WIDE
    norm = (2 if chain else 1) * state + sizes.hidden * part.narrow  # what it and the output layer keep
    table = sizes.vocabulary * sizes.hidden
    weights = table * part.narrow / part.tensor if part.narrow < WIDE else 0.0
    scores = sizes.vocabulary * (2 * WIDE + (part.narrow if part.narrow < WIDE else 0))
    return {
        # the scores, in fp32 too, and their log-softmax
        "scores": part.tokens * (norm + scores) + weights,
        # the log-softmax, its gradient and that of the scores; of all words, in fp32, whole in every process
        "loss": part.tokens * (norm + 3 * sizes.vocabulary * WIDE) + weights,
        # the gradient of the scores becomes that of the output layer's weights and of what it read
        "output layer": part.tokens * (norm + state + sizes.vocabulary * WIDE) + table * WIDE / part.tensor + weights,
        # the last norm's backward pass: its input, and gradients of the steps it is made of
        "last norm": part.tokens * state * (6 if chain else 3) + table * WIDE / part.tensor,
    }
