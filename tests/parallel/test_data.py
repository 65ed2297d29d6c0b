"""Averages of weights: by accelerate's local SGD and by ours, on time and late."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import nn

from hf_tfast.parallel.data import DelayedAverage
from tests.parallel.ranks import run
from tests.parallel.trainings import train
from tests.training.tiny import write_texts

EVERY, STEPS = 3, 7


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def gradients(net, rank, step):
    """The gradient of this rank's own data, without talking to anybody."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)
    net.zero_grad()
    net(x).square().mean().backward()


def sgd(net):
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad


def simulated(delay, every=EVERY, ranks=2):
    """What the definition says, in one process: weights of every rank after STEPS steps and a flush."""
    nets, waiting = [model() for _ in range(ranks)], None
    for step in range(1, STEPS + 1):
        for rank, net in enumerate(nets):
            gradients(net, rank, step)
            sgd(net)
        if waiting and step == waiting[0]:
            merge(nets, *waiting[1:])
            waiting = None
        if step % every == 0:
            then = [[p.detach().clone() for p in net.parameters()] for net in nets]
            waiting = (step + delay, then)
            if not delay:
                merge(nets, then)
                waiting = None
    if waiting:
        merge(nets, waiting[1])
    return [torch.stack(ps).mean(0) for ps in zip(*[[p.detach() for p in n.parameters()] for n in nets], strict=True)]


@torch.no_grad()
def merge(nets, then):
    mean = [torch.stack(parts).mean(0) for parts in zip(*then, strict=True)]
    for net, before in zip(nets, then, strict=True):
        for p, m, w in zip(net.parameters(), mean, before, strict=True):
            p += m - w


def averaged():
    """On a rank: weights by delay, drifts, and those of accelerate's LocalSGD with the same steps."""
    rank, found, drifts = dist.get_rank(), {}, {}
    for delay in (0, 1, 2):
        net = model()
        average = DelayedAverage(net.parameters(), EVERY, delay)
        for step in range(1, STEPS + 1):
            gradients(net, rank, step)
            sgd(net)
            average.step()
        drifts[delay] = average.drift
        average.flush()
        found[delay] = [p.detach() for p in net.parameters()]
    accelerator = Accelerator(cpu=True)
    net = accelerator.prepare(model())
    with LocalSGD(accelerator, net, EVERY) as local:
        for step in range(1, STEPS + 1):
            gradients(net, rank, step)
            sgd(net)
            local.step()
    found["accelerate"] = [p.detach() for p in net.parameters()]
    return found, drifts, refused()


def refused():
    words = []
    for options in ({"every": 0}, {"every": 2, "delay": 2}, {"every": 1, "delay": -1}):
        try:
            DelayedAverage([], **options)
        except ValueError as error:
            words.append(str(error))
    return words


def test_averages_are_what_their_definition_says():
    (one, drifts, words), (other, _, _) = run(averaged, 2)
    for delay in (0, 1, 2):
        for a, b, expected in zip(one[delay], other[delay], simulated(delay), strict=True):
            assert torch.equal(a, b), "processes differ after a flush"
            assert torch.allclose(a, expected, rtol=0, atol=1e-12)
        assert 0 < drifts[delay] < 1
    for a, b in zip(one["accelerate"], one[0], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert not torch.allclose(one[1][0], one[0][0], rtol=0, atol=1e-9), "an average that is late is another average"
    assert len(words) == 3


def together(texts, folder):
    """On a rank: trainings that average seldom, and what they end with."""
    found = {}
    for name, options in {"local": {"average_every": 3}, "late": {"average_every": 3, "average_delay": 2}}.items():
        result, records = train(texts, folder / name, 2, max_steps=8, save_steps=4, eval_steps=4, **options)
        history = records[0].get("history") or [{}]
        found[name] = (result["eval"], result["weights"], [h["drift"] for h in history if "drift" in h])
    return found


@pytest.mark.slow
def test_trainings_that_average_seldom(tmp_path):
    texts = write_texts(tmp_path / "texts", count=12)
    one = train(texts, tmp_path / "one", max_steps=8, eval_steps=4)[0]
    first, second = run(together, 2, texts, tmp_path, group=False, timeout=300)
    for name in ("local", "late"):
        for weight, other in zip(first[name][1].values(), second[name][1].values(), strict=True):
            assert torch.equal(weight, other)
        assert first[name][0] == pytest.approx(one["eval"], rel=0.05)
        assert first[name][0] != pytest.approx(one["eval"], rel=1e-5), "weights were averaged in every step"
    assert first["late"][2], "drift is in the logs"
    assert max(first["late"][2]) > 0
    with pytest.raises(ValueError, match="there is only one"):
        train(texts, tmp_path / "alone", average_every=4)
