"""How the processes that share one sequence talk: a few collective operations, counted in bytes, each with a gradient.

    Wire          what talks: over a process group of torch.distributed (`GroupWire`), or between the threads of one
                  process (`simulate`), which is how tests and measurements have 8 ranks without 8 processes
    swap          tokens to other ranks; gradients travel the same way back
    total         a sum over ranks, everywhere; its gradient is the sum of the gradients
    prefix        running states: what the ranks before this one (or behind it) have summed up, from neighbour to
                  neighbour

Every rank calls the same operations in the same order, in the backward pass too: `after` ties what goes into one
operation to what came out of the one before, so that the engine of autograd has no choice.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["GroupWire", "Wire", "after", "prefix", "simulate", "swap", "total"]

Result = TypeVar("Result")
PATIENCE = 60.0  # seconds that a simulated rank waits for the others


class Wire:
    """One rank's end. `sent` counts the bytes that it gave to other ranks; sums and gathers as ring algorithms do."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sent = rank, size, 0

    def exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        """Send to and receive from other ranks; `receives` are buffers that are filled."""
        self.sent += sum(x.nbytes for x in sends.values())
        self._exchange({r: x.contiguous() for r, x in sends.items()}, receives)

    def gather(self, x: Tensor) -> Tensor:
        """[size, ..]: x of every rank, all of one shape."""
        self.sent += x.nbytes * (self.size - 1)
        return self._gather(x.contiguous())

    def reduce(self, x: Tensor, largest: bool = False) -> Tensor:
        """The sum, or the largest, of x over all ranks; a new tensor."""
        self.sent += 2 * x.nbytes * (self.size - 1) // self.size
        return self._reduce(x.contiguous(), largest)

    def _exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        raise NotImplementedError

    def _gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _reduce(self, x: Tensor, largest: bool) -> Tensor:
        raise NotImplementedError


class GroupWire(Wire):
    """Over a process group; None is the group of all processes."""

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "sequence parallelism needs a process group: start the script with torchrun or accelerate launch, "
                "which initialise torch.distributed, or call torch.distributed.init_process_group first"
            )
        self.group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(self.group)
        if rank < 0:
            raise ValueError("this process is not a member of the group that shares the sequence")
        super().__init__(rank, dist.get_world_size(self.group))
        self.ranks = dist.get_process_group_ranks(self.group)

    def _exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        ops = [dist.P2POp(dist.isend, x, self.ranks[r], self.group) for r, x in sorted(sends.items())]
        ops += [dist.P2POp(dist.irecv, x, self.ranks[r], self.group) for r, x in sorted(receives.items())]
        if ops:
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, self.group)
        return torch.stack(parts)

    def _reduce(self, x: Tensor, largest: bool) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, self.group)
        return x


class _Hall:
    """Where simulated ranks meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.left: dict[Any, Tensor] = {}

    def meet(self, put: dict[Any, Tensor], take: Callable[[dict[Any, Tensor]], Result]) -> Result:
        """Lay down, wait for all, take, wait for all."""
        self.left.update(put)
        self.barrier.wait()
        taken = take(self.left)
        self.barrier.wait()
        for key in put:
            del self.left[key]
        return taken


class _ThreadWire(Wire):
    def __init__(self, rank: int, size: int, hall: _Hall) -> None:
        super().__init__(rank, size)
        self.hall = hall

    def _exchange(self, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
        def take(left: dict[Any, Tensor]) -> None:
            for r, into in receives.items():
                into.copy_(left[r, self.rank])

        self.hall.meet({(self.rank, r): x for r, x in sends.items()}, take)

    def _gather(self, x: Tensor) -> Tensor:
        return self.hall.meet({self.rank: x}, lambda left: torch.stack([left[r] for r in range(self.size)]))

    def _reduce(self, x: Tensor, largest: bool) -> Tensor:
        every = self._gather(x)
        return every.amax(0) if largest else every.sum(0)


def simulate(size: int, run: Callable[[Wire], Result]) -> list[Result]:
    """run(wire) on `size` simulated ranks, threads of this process -> their results. The first error is raised."""
    hall, results, errors = _Hall(size), [None] * size, []

    def one(rank: int) -> None:
        try:
            results[rank] = run(_ThreadWire(rank, size, hall))  # type: ignore[call-overload]
        except BaseException as error:  # noqa: B036 raised below; the others must not wait for this rank
            errors.append(error)
            hall.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results  # type: ignore[return-value]


def after(x: Tensor, *before: Tensor | None) -> Tensor:
    """x, which autograd takes for a function of the tensors `before` too: their gradients come later than its own."""
    ties = [y for y in before if y is not None and y.requires_grad]
    return _After.apply(x, *ties) if ties else x


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *before: Tensor) -> Tensor:
        ctx.like = [(y.shape, y.dtype, y.device) for y in before]  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=t, device=d).expand(s) for s, t, d in ctx.like]  # type: ignore[attr-defined]
        return grad, *zeros


def swap(wire: Wire, x: Tensor, sends: dict[int, Tensor], receives: dict[int, int]) -> Tensor:
    """Rows of x [n ..] to other ranks, rows of theirs from them.

    sends     rank -> [m] int64: the rows that it gets, in that order.
    receives  rank -> how many rows come from it. -> [sum of these, ..], in the order of ranks.
    """
    return _Swap.apply(x, wire, sends, receives)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, wire: Wire, sends: dict[int, Tensor], receives: dict[int, int]) -> Tensor:
        ctx.wire, ctx.sends, ctx.receives, ctx.shape = wire, sends, receives, x.shape  # type: ignore[attr-defined]
        received = x.new_empty(sum(receives.values()), *x.shape[1:])
        parts = received.split([receives[r] for r in sorted(receives)])
        wire.exchange({r: x[rows] for r, rows in sends.items()}, dict(zip(sorted(receives), parts, strict=True)))
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        wire, sends, receives = ctx.wire, ctx.sends, ctx.receives  # type: ignore[attr-defined]
        shape: torch.Size = ctx.shape  # type: ignore[attr-defined]
        parts = dict(zip(sorted(receives), grad.split([receives[r] for r in sorted(receives)]), strict=True))
        back = {r: grad.new_empty(len(rows), *shape[1:]) for r, rows in sends.items()}
        wire.exchange(parts, back)
        dx = grad.new_zeros(shape)
        for r in sorted(back):
            dx.index_add_(0, sends[r], back[r])
        return dx, None, None, None


def total(wire: Wire, x: Tensor) -> Tensor:
    """The sum of x over all ranks, on each of them."""
    return _Total.apply(x, wire)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire  # type: ignore[attr-defined]
        return wire.reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.reduce(grad), None  # type: ignore[attr-defined]


def prefix(wire: Wire, sums: Tensor, level: Tensor, on: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """What the ranks before this one hold together; behind this one where `backwards`.

    sums [b ..], relative to exp(level), level [b ..] (broadcastable, a constant for autograd): what this rank holds
    and hands on. on [b] bool: is what comes in handed on as well, or does the sum begin anew here?
    -> sums and level of the others; a level of the least finite number where there is nothing.
    """
    given, level = _Prefix.apply(sums, level.detach(), on, wire, backwards)
    return given, level.detach()


class _Prefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, sums: Tensor, level: Tensor, on: Tensor, wire: Wire, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        step = -1 if backwards else 1
        ctx.wire, ctx.before, ctx.behind = wire, wire.rank - step, wire.rank + step  # type: ignore[attr-defined]
        least = torch.finfo(level.dtype).min
        past, held = torch.zeros_like(sums), torch.full_like(level, least)
        ctx.chain = _in_turn(wire, backwards)  # type: ignore[attr-defined]
        wide = lambda x, like: x.view(-1, *[1] * (like.ndim - 1))  # noqa: E731
        for sender in ctx.chain[:-1]:  # type: ignore[attr-defined]
            if sender == wire.rank:
                on = wide(on, level)
                top = torch.where(on, held, least).maximum(level)
                old, own = (held - top).exp().where(on, 0.0), (level - top).exp()
                wire.exchange({sender + step: _pack(past * old + sums * own, top)}, {})
                ctx.save_for_backward(old, own)
            elif sender + step == wire.rank:
                into = _pack(past, held)
                wire.exchange({}, {sender: into})
                past, held = _unpack(into, sums, level)
            else:
                wire.exchange({}, {})
        return past, held

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        wire: Wire = ctx.wire  # type: ignore[attr-defined]
        chain, before, behind = ctx.chain, ctx.before, ctx.behind  # type: ignore[attr-defined]
        own = torch.zeros_like(grad)
        for receiver in reversed(chain[1:]):
            if receiver == wire.rank:
                wire.exchange({before: grad}, {})
            elif receiver == behind:
                sent = torch.empty_like(grad)
                wire.exchange({}, {receiver: sent})
                kept, mine = ctx.saved_tensors  # type: ignore[attr-defined]
                own, grad = sent * mine, grad + sent * kept
            else:
                wire.exchange({}, {})
        return own, None, None, None, None


def _in_turn(wire: Wire, backwards: bool) -> list[int]:
    return list(range(wire.size))[:: -1 if backwards else 1]


def _pack(sums: Tensor, level: Tensor) -> Tensor:
    return torch.cat([sums.flatten(), level.flatten()])


def _unpack(flat: Tensor, sums: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    first, second = flat.split([sums.numel(), level.numel()])
    return first.view_as(sums), second.view_as(level)
