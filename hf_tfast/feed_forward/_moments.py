"""Moments of a layer's inputs: what calibration keeps of the data, gathered batch by batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT = 4096  # input rows kept as a sample


@dataclass(kw_only=True)
class Moments:
    """Of the inputs x [n d] of one layer, in float64:

    count    n so far.
    mean     [d]
    second   [d d], E[x x^T], not centred.
    sample   [<= 4096 d], rows of the inputs in their own dtype: the first ones, then ever rarer ones (reservoir).
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    second: Tensor = field(default_factory=lambda: torch.empty(0))
    sample: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, x: Tensor) -> None:
        """Take in x [n d]. ValueError if it is not finite."""
        if not bool(torch.isfinite(x).all()):
            raise ValueError("calibration data gives activations that are not finite: check the batches and the model")
        n, d = x.shape
        if not n:
            return
        if not self.count:
            self.mean = torch.zeros(d, dtype=torch.float64, device=x.device)
            self.second = torch.zeros(d, d, dtype=torch.float64, device=x.device)
            self.sample = x[:0]
        wide = x.float()
        total = self.count + n
        self.mean += (wide.sum(0).double() - n * self.mean) / total
        self.second += ((wide.mT @ wide).double() - n * self.second) / total
        self._keep(x)
        self.count = total

    def _keep(self, x: Tensor) -> None:
        """Reservoir sampling: after n rows each has been kept with equal chance. Draws depend on the counts only."""
        room = KEPT - len(self.sample)
        self.sample = torch.cat([self.sample, x[: max(room, 0)].clone()])
        rest = x[max(room, 0) :]
        if len(rest):
            seen = torch.arange(self.count + max(room, 0), self.count + len(x)) + 1
            draws = torch.Generator().manual_seed(self.count)
            slots = (torch.rand(len(rest), generator=draws, dtype=torch.float64) * seen).long()
            won = slots < KEPT
            # of several rows that win one slot the last must stay, as if they came one by one
            last = dict(zip(slots[won].tolist(), won.nonzero()[:, 0].tolist(), strict=True))
            if last:
                at = torch.tensor(list(last), device=x.device)
                self.sample[at] = rest[torch.tensor(list(last.values()), device=x.device)]

    @property
    def covariance(self) -> Tensor:
        """[d d]: of the inputs around their mean."""
        return self.second - torch.outer(self.mean, self.mean)

    def part(self, kept: Tensor) -> "Moments":
        """Of some of the input features: kept [m] int64."""
        return Moments(
            count=self.count,
            mean=self.mean[kept],
            second=self.second[kept][:, kept],
            sample=self.sample[:, kept],
        )

    def through(self, weight: Tensor) -> "Moments":
        """Of weight x, for a layer without bias: weight [m d]."""
        wide = weight.detach().to(self.second)
        return Moments(
            count=self.count,
            mean=wide @ self.mean,
            second=wide @ self.second @ wide.mT,
            sample=self.sample @ weight.detach().to(self.sample).mT,
        )
