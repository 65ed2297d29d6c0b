"""What a training step computes, and the bytes that it moves between its products, on one GPU.

A step is a chain of operations. Products are bound by arithmetic; what lies between them (norms, rotations, activation
functions, residuals, the loss, the optimiser) reads and writes tensors and is bound by memory. Counted is what single
operations read and write in PyTorch; tables that all heads share and numbers a row are left out. Under tensor
parallelism norms and residuals are computed whole in every process.
"""

from ..attention import Mechanism
from .estimate_memory import WIDE, chained
from .estimate_model import Sizes, pairs_per_token

__all__ = ["moved_of_layer", "moved_of_loss", "moved_of_weights", "operations"]

Moved = tuple[float, float]  # whole in every process of a tensor layout, and cut among them


def operations(sizes: Sizes, mechanism: Mechanism, length: int, checkpointing: bool) -> tuple[float, float]:
    """Of a token, in one layer and in the output layer: forward, twice that backward (attention computes its weights
    once more), and forward once more where activations are computed again."""
    products, again = (4, 4.5) if checkpointing else (3, 3.5)
    attention = 4.0 * sizes.heads * sizes.width * pairs_per_token(mechanism, sizes, length)
    return 2.0 * sizes.layer * products + attention * again, 2.0 * sizes.vocabulary * sizes.hidden * 3


def moved_of_layer(sizes: Sizes, narrow: int, fused_norm: bool) -> dict[str, tuple[Moved, Moved]]:
    """{what: (forward, backward)} in bytes of a token."""
    state, inner = sizes.hidden * WIDE, sizes.inner * narrow
    turned = (sizes.heads + sizes.groups) * sizes.width * (WIDE + narrow)
    cast = sizes.readers * sizes.hidden * (WIDE + narrow) if narrow < WIDE else 0.0
    # passes over a state. The chain: x^2 2, mean 1, x / rms 2, times weights 2. Backward: of the weights 2 + 4, of
    # x / rms 2 + 4, of the mean 1, of x^2 6, and the sum of both ways to x 3. In one operation: 2, and 5
    norm, norm_back = (7, 22) if chained(sizes, fused_norm) else (2, 5)
    # x cos 2, -x 1, both halves 2, times sin 2, sum 3; as many backward
    turn = 5 * turned if sizes.rotary else 0.0
    act, act_back = (5, 9) if sizes.gated else (2, 3)
    return {
        "norms": ((2 * norm * state, 0), (2 * norm_back * state, 0)),
        "narrow copies": ((cast, 0), (cast, 0)),
        "rotations": ((0, turn), (0, turn)),
        "activation functions": ((0, act * inner), (0, act_back * inner)),
        "residuals": ((2 * (2 * state + sizes.hidden * narrow), 0), (2 * 3 * state, 0)),
        # matrices that read the same state each have a gradient for it
        "sums of gradients": ((0, 0), ((sizes.readers - 2) * 3 * state, 0)),
    }


def moved_of_loss(sizes: Sizes) -> float:
    """Bytes of a token behind the last layer: log-softmax 3 passes over all words, its gradient 4, the loss's 1."""
    return 8.0 * sizes.vocabulary * WIDE


def moved_of_weights(held: float, summed: float, cast: float, rows: int, narrow: int) -> float:
    """Bytes of a step: AdamW reads weight, gradient and both moments and writes three of them; their norm is read
    twice and they are clipped; every row adds to the `summed` gradients and, under autocast, copies `cast` weights.

    The first row's addition is counted, too, though there is nothing to add to.
    """
    copies = cast * (WIDE + narrow) if narrow < WIDE else 0.0
    return held * WIDE * (7 + 2 + 2) + rows * (summed * 3 * WIDE + copies)
