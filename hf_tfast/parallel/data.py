"""Data parallelism that talks seldom: weights are averaged every few steps, and the average may arrive late.

    average = DelayedAverage(model.parameters(), every=8, delay=1)
    for batch in batches:
        ...                      # forward, backward and update of this process alone
        average.step()
    average.flush()              # all processes hold the same weights

Every `every` steps each process lays down a copy of its weights w, and their mean m over the processes is computed
while training goes on. `delay` steps later the process has moved on to w + u and continues from m + u: its own updates
since then are kept, and what the others found out by then is added. So a process waits for the others only where an
average takes longer than `delay` steps, and nobody trains on weights of others that are older than `every + delay`
steps: that is the bound on staleness. delay=0 is local SGD, which waits; every=1 with it averages after every step.

Source: local SGD, Stich (https://arxiv.org/abs/1805.09767); averages that overlap with computing: Wang et al., Overlap
Local-SGD (https://arxiv.org/abs/2002.09539). Differs from the latter: there is no anchor model and no momentum over
averages. States of optimisers stay with their process, as in Accelerate's LocalSGD.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DelayedAverage"]


class DelayedAverage:
    """Averages of parameters over a process group, begun every `every` steps and applied `delay` steps later.

    parameters  of one device, in one order on all processes. Their sums travel in a group of their own, so that other
                collective operations do not queue behind them. All processes must make this object and call `step`
                equally often.
    drift       how far this process was from the last mean that arrived: |w - m| / |m|, in fp32.
    """

    def __init__(self, parameters: Iterable[Tensor], every: int, delay: int = 0) -> None:
        if every < 1 or delay < 0:
            raise ValueError(f"every must be at least 1 and delay at least 0, got {every} and {delay}")
        if delay and delay >= every:
            raise ValueError(
                f"an average that takes {delay} steps must be done before the next begins: give every more than "
                f"{delay}, got {every}"
            )
        if not dist.is_initialized():
            raise ValueError("averaging needs a process group; start the script with torchrun or accelerate launch")
        self.parameters = list(parameters)
        self.every, self.delay = every, delay
        self.group: Any = dist.new_group()
        self.size = dist.get_world_size(self.group)
        self.steps = 0
        self.drift: float | None = None
        self._begun: list[tuple[list[Tensor], Tensor, Tensor, Any]] = []
        self._due = 0

    def step(self) -> None:
        """After every update. Waits where the average that is due has not arrived."""
        self.steps += 1
        if self._begun and self.steps == self._due:
            self._arrive()
        if self.steps % self.every == 0:
            self._begin()
            self._due = self.steps + self.delay
            if not self.delay:
                self._arrive()

    def flush(self) -> None:
        """Wait for what is under way and average once more: then all processes hold the same weights."""
        if self._begun:
            self._arrive()
        self._begin()
        self._arrive(equal=True)

    @torch.no_grad()
    def _begin(self) -> None:
        for dtype in {p.dtype for p in self.parameters}:
            mine = [p for p in self.parameters if p.dtype == dtype]
            snapshot = torch.cat([p.detach().flatten() for p in mine])
            total = snapshot / self.size  # divided first: a sum of fp16 weights could overflow
            work = dist.all_reduce(total, group=self.group, async_op=True)
            self._begun.append((mine, snapshot, total, work))
        self._begun.sort(key=lambda entry: str(entry[2].dtype))

    @torch.no_grad()
    def _arrive(self, equal: bool = False) -> None:
        apart = size = 0.0
        for parameters, snapshot, mean, work in self._begun:
            work.wait()
            apart += float((snapshot.float() - mean.float()).square().sum())
            size += float(mean.float().square().sum())
            start = 0
            for p in parameters:
                end = start + p.numel()
                if equal or not self.delay:
                    p.copy_(mean[start:end].view_as(p))
                else:
                    p.add_((mean[start:end] - snapshot[start:end]).view_as(p))
                start = end
        self.drift = (apart / size) ** 0.5 if size else 0.0
        self._begun.clear()
