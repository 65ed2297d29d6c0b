"""All keys and values of a layer as one running state of features, whose size does not depend on their number."""

import torch
from torch import Tensor

from .growing import Change, Lengths, longer
from .scan import State, absorb

RECENT = 32  # slots that `take_back` can always forget; up to twice as many are kept as they came


class Running:
    """The state of all tokens but the last RECENT to 2 RECENT slots, which are kept as they came and summed up later:
    they can be taken back. No gradient.

    keys, values   [b g m .] of the last m slots.
    there          None, or [b m] bool: which of these hold tokens.
    recording      no slot is summed up before `take_back` is called.
    """

    def __init__(self) -> None:
        self.state: State | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.there: Tensor | None = None
        self.lengths: Lengths = 0
        self.recording = False
        self.features: tuple[Tensor, float] | None = None  # directions and scale of every call, shared with the others

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the slots that are kept; not of the directions, which all layers share."""
        held = [*(self.state or ()), self.keys, self.values, self.there, self.lengths]
        return sum(x.nbytes for x in held if isinstance(x, Tensor))

    def append(self, k: Tensor, v: Tensor, features: tuple[Tensor, float], new: Tensor | None = None) -> None:
        """Take in keys k [b g m d] and values v [b g m e], the next m slots, of which those in `new` [b m] hold
        tokens; None: all. `features` are the directions [h R d] and the scale of `absorb`."""
        before = 0 if self.keys is None else self.keys.shape[2]
        if new is not None or self.there is not None:
            ones = lambda m: torch.ones(len(k), m, dtype=torch.bool, device=k.device)  # noqa: E731
            old = ones(before) if self.there is None else self.there
            self.there = torch.cat([old, ones(k.shape[2]) if new is None else new], 1)
        self.keys = k.detach() if self.keys is None else torch.cat([self.keys, k.detach()], 2)
        self.values = v.detach() if self.values is None else torch.cat([self.values, v.detach()], 2)
        self.lengths, self.features = longer(self.lengths, k.shape[2], new), features

    def settle(self) -> None:
        """The last slots have been attended to: sum up what need not be kept."""
        if self.keys is not None and self.keys.shape[2] > 2 * RECENT and not self.recording:
            self._sum_up(self.keys.shape[2] - RECENT)

    def most_back(self) -> int:
        """How many slots `take_back` can forget."""
        return 0 if self.keys is None else self.keys.shape[2]

    def take_back(self, slots: int, lengths: Lengths) -> None:
        """Forget the last `slots` slots, so that the rows hold `lengths` tokens; sum up what only a recording kept."""
        self.lengths = lengths
        if self.keys is None:
            return
        self._keep(slice(0, self.keys.shape[2] - slots))
        if self.keys.shape[2] > 2 * RECENT:
            self._sum_up(self.keys.shape[2] - RECENT)

    def rows(self, change: Change) -> None:
        """Do `change` to the batch."""
        self.state = None if self.state is None else State(*map(change, self.state))
        self.keys, self.values, self.there = (
            None if x is None else change(x) for x in (self.keys, self.values, self.there)
        )
        self.lengths = change(self.lengths) if isinstance(self.lengths, Tensor) else self.lengths

    def _keep(self, at: slice) -> None:
        if self.keys is None or self.values is None:
            return
        self.keys, self.values = self.keys[:, :, at].clone(), self.values[:, :, at].clone()
        there = None if self.there is None else self.there[:, at]
        self.there = None if there is None or bool(there.all()) else there.clone()

    def _sum_up(self, slots: int) -> None:
        """Move the first `slots` slots into the state."""
        if self.keys is None or self.values is None or self.features is None:
            return
        k, v, (w, scale) = self.keys[:, :, :slots], self.values[:, :, :slots], self.features
        there = None if self.there is None else self.there[:, :slots]
        if there is None or bool(there.all()):
            self.state = absorb(self.state, k, v, w, scale)
        else:
            rows = []
            for b, at in enumerate(there):
                row = slice(b, b + 1)
                before = None if self.state is None else State(*(x[row] for x in self.state))
                rows.append(absorb(before, k[row][:, :, at], v[row][:, :, at], w, scale))
            self.state = State(*map(torch.cat, zip(*rows, strict=True)))
        self._keep(slice(slots, None))
