"""Memory and time of one training step of a layout, on paper: formulas alone, from a model's config.

    estimate(sizes, mechanism, Run(length=2**20, batch=64, gpus=1024), HARDWARE["h100"])

The formulas are those of docs/scale.md. A time is a lower bound: products and what lies between them come one after
the other, the network is taken to be in use beside them, and nothing ever waits. `efficiency` is the share of the peak
that matrix products reach.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from ..attention import Mechanism
from .estimate_hardware import Hardware
from .estimate_memory import WIDE, Part, of_ends
from .estimate_model import Sizes, cache_bytes, halo, sent_per_layer
from .estimate_time import moved_of_layer, moved_of_loss, moved_of_weights, operations

__all__ = ["Estimate", "Run", "Shares", "estimate", "layouts"]

WEIGHT, GRADIENT, OPTIMISER = 4, 4, 8  # bytes a number: fp32 weights, also where autocast computes in bf16; AdamW
USABLE = 0.9  # of a GPU's memory; the rest is the allocator's and the libraries'


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained: `batch` sequences of `length` tokens a step, on `gpus` GPUs.

    narrow  bytes of a number that layers compute with: 2 under bf16 autocast, 4 in fp32.
    """

    length: int
    batch: int
    gpus: int
    checkpointing: bool = False
    efficiency: float = 0.4
    narrow: int = 2

    def __post_init__(self) -> None:
        for name in ("length", "batch", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency is a share of the peak, above 0 and at most 1, got {self.efficiency}")
        if self.narrow not in (2, 4):
            raise ValueError(f"numbers have 2 bytes (bf16 autocast) or 4 (fp32), got {self.narrow}")


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How many GPUs share what; the product is the number of GPUs. Tensor is the innermost."""

    tensor: int = 1
    sequence: int = 1
    pipeline: int = 1
    shard: int = 1
    replicas: int = 1

    @property
    def data(self) -> int:
        return self.shard * self.replicas

    @property
    def runs(self) -> bool:
        """Do the recipes train it? A shared sequence and a pipeline combine with replicas alone, one at a time."""
        kinds = (self.tensor * self.shard > 1, self.sequence > 1, self.pipeline > 1)
        return sum(kinds) < 2

    def __str__(self) -> str:
        return " x ".join(f"{name} {n}" for name, n in asdict(self).items() if n > 1) or "one GPU"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on the fullest GPU and bytes that it sends in a step; seconds that each resource alone would need.

    gradients  under FSDP2 without replicas whole ones, where a GPU has several rows: scattered after the last.
    copies     weights of other GPUs that are gathered, or the buckets of DistributedDataParallel.
    beside     are there gradients of earlier rows while activations are at their peak?
    buckets    in which a shared sequence sums its gradients, when activations have gone.
    """

    shares: Shares
    weights: float
    gradients: float
    optimiser: float
    copies: float
    activations: float
    beside: bool
    buckets: float
    cache: float
    compute_s: float
    bandwidth_s: float
    network_s: float
    sent: float
    fits: bool

    @property
    def memory(self) -> float:
        at_peak = self.activations + (self.gradients if self.beside else 0)
        return self.weights + self.optimiser + self.copies + max(at_peak, self.gradients + self.buckets)

    @property
    def step_s(self) -> float:
        return max(self.compute_s + self.bandwidth_s, self.network_s)

    @property
    def bound(self) -> str:
        if self.network_s > self.compute_s + self.bandwidth_s:
            return "network"
        return "compute" if self.compute_s >= self.bandwidth_s else "bandwidth"

    def to_dict(self) -> dict[str, Any]:
        extra = {"memory": self.memory, "step_s": self.step_s, "bound": self.bound, "layout": str(self.shares)}
        return {**asdict(self), **extra, "in_recipes": self.shares.runs}


def estimate(
    sizes: Sizes, mechanism: Mechanism, run: Run, hardware: Hardware, shares: Shares | None = None
) -> list[Estimate]:
    """Every layout that divides evenly (or the one given), those that fit first, the fastest of them first.

    Among equals, to two digits, those that the recipes train come first, and then the simplest. ValueError where no
    layout divides, naming what would have to, and for a given one that does not.
    """
    if shares is not None:
        _check(run, shares)
    tried = [shares] if shares is not None else list(layouts(sizes, mechanism, run, hardware))
    if not tried:
        raise ValueError(
            f"{run.gpus} GPUs cannot share {run.batch} sequences of {run.length} tokens and {sizes.layers} layers of "
            f"{sizes.heads} heads evenly: choose a batch, a length or a number of GPUs with more divisors in common"
        )
    found = [_one(sizes, mechanism, run, hardware, one) for one in tried]
    return sorted(found, key=_worth)


def layouts(sizes: Sizes, mechanism: Mechanism, run: Run, hardware: Hardware) -> Iterator[Shares]:
    """Every way to share the GPUs in which heads, layers, tokens and sequences divide evenly."""
    from .sequence_attention import EXCHANGES

    for t in _divisors(run.gpus):
        if t > hardware.per_machine or sizes.heads % t or sizes.groups % t or sizes.inner % t:
            continue
        for s in _divisors(run.gpus // t):
            if run.length % s or (s > 1 and mechanism.name not in EXCHANGES):
                continue
            for p in _divisors(run.gpus // (t * s)):
                data = run.gpus // (t * s * p)
                if p > sizes.layers or run.batch % data or run.batch // data < p:
                    continue
                for f in _divisors(data):
                    yield Shares(tensor=t, sequence=s, pipeline=p, shard=f, replicas=data // f)


def _check(run: Run, shares: Shares) -> None:
    used = shares.tensor * shares.sequence * shares.pipeline * shares.data
    if used != run.gpus:
        raise ValueError(f"{shares} takes {used} GPUs, and there are {run.gpus}: their product is the number of GPUs")
    if run.batch % shares.data:
        raise ValueError(f"{run.batch} sequences cannot be shared evenly by {shares.data} (shard x replicas)")
    if run.batch // shares.data < shares.pipeline:
        raise ValueError(
            f"a pipeline of {shares.pipeline} needs as many rows at least, and has {run.batch // shares.data}: raise "
            f"the batch to {shares.pipeline * shares.data}"
        )


def _one(sizes: Sizes, mechanism: Mechanism, run: Run, hardware: Hardware, shares: Shares) -> Estimate:
    held = _held(sizes, shares)
    per_gpu = held / shares.shard
    part = Part(
        rows=run.batch // shares.data, tokens=run.length / shares.sequence, tensor=shares.tensor,
        stages=shares.pipeline, narrow=run.narrow, fused_norm=hardware.fused_norm, checkpointing=run.checkpointing,
        halo=halo(sizes, mechanism) if shares.sequence > 1 else 0,
    )  # fmt: skip
    gradients = (held if _late(run, shares) else per_gpu) * GRADIENT
    # of a pipeline the first stage is at its fullest before its first backward pass, the last one at every row's
    ends = zip(of_ends(sizes, mechanism, part), (part.rows > shares.pipeline, part.rows > 1), strict=True)
    fullest, beside = max(ends, key=lambda end: end[0] + (gradients if end[1] else 0))
    groups = list(_traffic(sizes, mechanism, run, shares, hardware))
    links = [hardware.link(span) for span, _, _ in groups]
    compute, bandwidth = _seconds(sizes, mechanism, run, part, hardware)
    bandwidth += moved_of_weights(per_gpu, gradients / GRADIENT, held, part.rows, run.narrow) / hardware.bandwidth
    e = Estimate(
        shares=shares,
        weights=per_gpu * WEIGHT,
        gradients=gradients,
        optimiser=per_gpu * OPTIMISER,
        copies=_copies(sizes, shares, held),
        activations=fullest,
        beside=beside,
        buckets=_buckets(sizes, shares, per_gpu),
        cache=cache_bytes(sizes, mechanism, run.length, run.narrow),
        compute_s=compute,
        bandwidth_s=bandwidth,
        network_s=sum(b / fast + n * wait for (_, b, n), (fast, wait) in zip(groups, links, strict=True)),
        sent=sum(b for _, b, _ in groups),
        fits=False,
    )
    return replace(e, fits=e.memory <= USABLE * hardware.memory)


def _held(sizes: Sizes, shares: Shares) -> float:
    """Weights of the fullest stage, before they are sharded. Of a pipeline the first stage has the embeddings and the
    last the output layer, tied ones twice."""
    if shares.pipeline == 1:
        return sizes.parameters / shares.tensor
    return (ceil(sizes.layers / shares.pipeline) * sizes.layer + sizes.vocabulary * sizes.hidden) / shares.tensor


def _late(run: Run, shares: Shares) -> bool:
    """Are gradients scattered after the last row alone? So does Trainer with FSDP2 and no replicas; with replicas it
    scatters after every row, and sums over them after the last."""
    return shares.shard > 1 and shares.replicas == 1 and run.batch // shares.data > 1


def _buckets(sizes: Sizes, shares: Shares, per_gpu: float) -> float:
    """Of a shared sequence gradients are summed bucket by bucket: one beside them, and its sum. No matrix is split."""
    from .sequence import BUCKET

    if shares.sequence == 1:
        return 0.0
    largest = max(sizes.vocabulary, sizes.inner) * sizes.hidden / (shares.tensor * shares.shard)
    return 2 * min(per_gpu, max(BUCKET, largest)) * GRADIENT


def _copies(sizes: Sizes, shares: Shares, held: float) -> float:
    """FSDP2 has one layer gathered while the next one is fetched, and embeddings and output layer during the whole
    step; DistributedDataParallel keeps gradients a second time, in the buckets that it sums."""
    if shares.shard > 1:
        ends = sizes.vocabulary * sizes.hidden * (1 if sizes.tied else 2)
        return (ends + 2 * sizes.layer) / shares.tensor * WEIGHT
    plain = shares.tensor == shares.sequence == shares.pipeline == 1
    return held * GRADIENT if plain and shares.replicas > 1 else 0.0


def _seconds(sizes: Sizes, mechanism: Mechanism, run: Run, part: Part, hardware: Hardware) -> tuple[float, float]:
    """Of products, and of what lies between them, on the busiest stage, with the time that it waits for others."""
    layer, output = operations(sizes, mechanism, run.length, run.checkpointing)
    between = 0.0  # of one layer and token
    for forward, backward in moved_of_layer(sizes, run.narrow, hardware.fused_norm).values():
        for whole, cut in (forward, backward, *([forward] if run.checkpointing else [])):
            between += whole + cut / part.tensor
    first, last = ceil(sizes.layers / part.stages), sizes.layers // part.stages
    per_token = []
    for of_layer, end in ((layer / part.tensor, output / part.tensor), (between, moved_of_loss(sizes))):
        whole = sizes.layers * of_layer + end
        busiest = whole if part.stages == 1 else max(first * of_layer, last * of_layer + end)
        # a row passes the other stages before the busiest one can begin, and after it is done
        per_token.append(part.rows * busiest + whole - busiest)
    products, moved = (part.tokens * x for x in per_token)
    return products / (hardware.flops * run.efficiency), moved / hardware.bandwidth


def _traffic(
    sizes: Sizes, mechanism: Mechanism, run: Run, shares: Shares, hardware: Hardware
) -> Iterator[tuple[int, float, float]]:
    """(neighbours among whom a group lies, bytes that a member sends in a step, messages one after another) of every
    kind of sharing; groups inside a machine use its faster links."""
    held, rows, tokens = _held(sizes, shares), run.batch // shares.data, run.length // shares.sequence
    layers = sizes.layers / shares.pipeline
    states = rows * tokens * sizes.hidden * run.narrow
    t, s, span = shares.tensor, shares.sequence, shares.tensor
    if t > 1:
        # two sums a layer forward; backward one for every matrix that reads the states, as Transformers does it;
        # embeddings forward, the output layer backward, and its logits
        # computed again, a layer sums what attention put out once more; torch stops before its last sum
        sums = layers * (2 + 3 + (2 if sizes.gated else 1) + (1 if run.checkpointing else 0)) + 2
        logits = rows * tokens * sizes.vocabulary * run.narrow * (t - 1) / t
        yield span, sums * states * 2 * (t - 1) / t + logits, rows * (sums + 1)
    span *= s
    if s > 1:
        exchanged, hops = sent_per_layer(sizes, mechanism, s, run.narrow)
        again = 1.5 if run.checkpointing else 1.0  # half of it is sent forward
        summed, rounds = _all_reduce(held * GRADIENT / shares.shard, s)
        yield span, again * layers * rows * exchanged / t + summed, again * layers * hops * rows + rounds
    span *= shares.pipeline
    if shares.pipeline > 1:  # states forward, gradients backward, of two stages one each; tied embeddings of the ends
        tied = sizes.vocabulary * sizes.hidden * GRADIENT if sizes.tied else 0
        wide = states * WIDE / run.narrow  # the sums between layers are fp32
        yield span, (1 if shares.pipeline == 2 else 2) * wide + tied / t, 2 * rows
    span *= shares.shard
    if shares.shard > 1:
        # a row gathers layers forward and backward, embeddings and output layer once; gradients are scattered; all in
        # fp32, of which autocast makes bf16. gloo scatters by an all-reduce, which sends twice as much
        ends = sizes.vocabulary * sizes.hidden * (1 if sizes.tied else 2) / t
        scattered = held * (2 if hardware.reduces_whole else 1)
        part = (shares.shard - 1) / shares.shard
        times = 1 if _late(run, shares) else rows
        size = rows * (2 * held - ends) + times * scattered
        yield span, size * WEIGHT * part, (2 * rows + times) * layers
    span *= shares.replicas
    if shares.replicas > 1:
        yield span, *_all_reduce(held * GRADIENT / shares.shard, shares.replicas)


def _all_reduce(size: float, ranks: int) -> tuple[float, float]:
    return 2 * size * (ranks - 1) / ranks, 2 * (ranks - 1) ** 0.5


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _worth(e: Estimate) -> tuple[Any, ...]:
    return not e.fits, float(f"{e.step_s if e.fits else e.memory:.1e}"), not e.shares.runs, *_complexity(e.shares)


def _complexity(shares: Shares) -> tuple[int, int, int]:
    """Fewer kinds of sharing first, then less tensor and pipeline."""
    return sum(n > 1 for n in asdict(shares).values()), shares.pipeline, shares.tensor
