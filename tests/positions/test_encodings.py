"""Additive position encodings: equal to the formula everywhere, on every device and dtype, clear about their ends."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_tfast.positions import LearnedPositions, LowRankPositions, SinusoidalPositions, encodings, make_positions
from hf_tfast.positions.encodings import sinusoidal_rank
from hf_tfast.testing import generator


def by_hand(position, width):
    """The formula in Python's own arithmetic, one channel at a time."""
    angles = [position / 10000.0 ** (2 * (c // 2) / width) for c in range(width)]
    return [math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)]


@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("position", [0, 1, 63, 64, 65, 4097, 131071, 999_999, 1_000_000, 16_777_217])
def test_lookup_is_the_formula(width, position):
    positions = SinusoidalPositions(width, length=64)
    expected = torch.tensor(by_hand(position, width), dtype=torch.float64)
    ids = torch.tensor([[position]])
    for dtype, bound in ((torch.float64, 4e-9), (torch.float32, 6.1e-8), (torch.bfloat16, 2**-9)):
        assert (positions(ids, dtype)[0, 0].double() - expected).abs().max() <= bound, dtype
    assert len(positions.table) == 64
    assert positions.longer is None or len(positions.longer) <= 128  # position 64 alone is the next row


def test_channels():
    rows = SinusoidalPositions(6)(torch.tensor([[3]]), torch.float32)[0, 0]
    assert rows[0].item() == pytest.approx(math.sin(3.0))
    assert rows[1].item() == pytest.approx(math.cos(3.0))
    assert rows[2].item() == pytest.approx(math.sin(3.0 / 10000 ** (2 / 6)))


def test_many_positions_double_the_table_and_few_do_not():
    positions = SinusoidalPositions(8, length=16)
    whole = torch.arange(100)[None]
    expected = encodings.sinusoids(whole, 8).float()
    assert torch.equal(positions(whole, torch.float32), expected)
    assert len(positions.longer) == 128
    before = positions.longer
    assert torch.equal(positions(whole[:, 90:], torch.float32), expected[:, 90:])
    assert positions.longer is before
    positions(torch.tensor([[5000]]), torch.float32)
    assert positions.longer is before
    positions(torch.tensor([[128]]), torch.float32)  # decoding arrives at the end of the table
    assert len(positions.longer) == 256


def test_no_table_is_larger_than_the_bound(monkeypatch):
    monkeypatch.setattr(encodings, "LARGEST_TABLE", 8 * 100)
    positions = SinusoidalPositions(8, length=1000)
    assert len(positions.table) == 100
    ids = torch.arange(300)[None]
    assert torch.equal(positions(ids, torch.float32), encodings.sinusoids(ids, 8).float())
    assert positions.longer is None
    positions = SinusoidalPositions(8, length=10)
    positions(ids[:, :90], torch.float32)
    assert len(positions.longer) == 100


def test_a_million_positions_at_once_need_no_float64_table(monkeypatch):
    largest = []
    formula = encodings.sinusoids
    monkeypatch.setattr(
        encodings, "sinusoids", lambda p, width: largest.append(p.numel() * width) or formula(p, width)
    )
    rows = SinusoidalPositions(2, length=1)(torch.arange(1_000_000)[None], torch.float32)
    assert rows.shape == (1, 1_000_000, 2)
    assert max(largest) <= encodings._CHUNK


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to_empty", "deepcopy", "pickle"])
def test_the_table_stays_right_in_fp32(change):
    module = nn.Sequential(nn.Linear(2, 2), SinusoidalPositions(8, length=32))
    module[1](torch.arange(40)[None], torch.float32)
    if change == "to_empty":
        module = nn.Sequential(nn.Linear(2, 2), SinusoidalPositions(8, length=32).to("meta")).to_empty(device="cpu")
    elif change in ("deepcopy", "pickle"):
        module = copy.deepcopy(module) if change == "deepcopy" else pickle.loads(pickle.dumps(module))
        assert module[1].longer is None
    else:
        getattr(module, change)()
    table = module[1].table
    assert table.dtype == torch.float32
    assert torch.equal(table, encodings.sinusoids(torch.arange(32), 8).float())
    assert list(module.state_dict()) == ["0.weight", "0.bias"]


def test_the_table_is_recomputed_where_the_positions_are(monkeypatch):
    positions = SinusoidalPositions(8, length=32).to("meta")  # as an offloaded buffer
    ids = torch.arange(20)[None]
    assert torch.equal(positions(ids, torch.float32), encodings.sinusoids(ids, 8).float())
    assert positions.longer.device.type == "cpu"
    assert positions(ids.to("meta"), torch.float32).is_meta


def test_built_under_a_device_context_of_meta():
    with torch.device("meta"):
        modules = SinusoidalPositions(8), LearnedPositions(8, 16), LowRankPositions(8, 16, 2, error=0.1)
    assert all(x.is_meta for m in modules for x in (*m.parameters(), *m.buffers()))
    assert modules[0](torch.tensor([[7]]), torch.float32).device.type == "cpu"


def test_a_table_made_under_inference_mode_serves_training():
    positions = SinusoidalPositions(4, length=2)
    with torch.inference_mode():
        positions(torch.arange(9)[None], torch.float32)
    x = torch.ones(1, 9, 4, requires_grad=True)
    (x * positions(torch.arange(9)[None], torch.float32)).sum().backward()
    assert x.grad is not None
    assert not positions.longer.is_inference()


def kinds(length=16):
    return {
        "sinusoidal": SinusoidalPositions(8, length),
        "learned": LearnedPositions(8, length),
        "low_rank": LowRankPositions(8, length, 3),
    }


@pytest.mark.parametrize("kind", kinds())
def test_positions_below_0_are_none(kind):
    positions = kinds()[kind]
    ids = torch.tensor([[-1, -7, 0, 1], [0, 1, 2, 3]])
    rows = positions(ids, torch.float32)
    assert rows[0, :2].abs().max() == 0
    assert torch.equal(rows[0, 2:], rows[1, :2])
    if any(True for _ in positions.parameters()):
        rows[0, :2].sum().backward()  # their gradient stays away from position 0
        assert all(p.grad.abs().max() == 0 for p in positions.parameters())


@pytest.mark.parametrize("kind", kinds())
def test_shapes_and_dtypes(kind):
    positions = kinds()[kind]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 5), (3, 5), (2, 0)):
            rows = positions(torch.randint(16, shape, generator=generator(kind, shape)), dtype)
            assert (rows.shape, rows.dtype) == ((*shape, 8), dtype)
    assert torch.equal(positions(torch.tensor([[3]], dtype=torch.int32), dtype), positions(torch.tensor([[3]]), dtype))
    for wrong in (torch.tensor([[1.0]]), torch.tensor([[True]])):
        with pytest.raises(ValueError, match="position_ids are integers"):
            positions(wrong, torch.float32)


@pytest.mark.parametrize("kind", ["learned", "low_rank"])
def test_past_the_table(kind):
    with pytest.raises(
        ValueError, match=r"position 16 was asked for, but the table has 16.*max_position_embeddings=17"
    ):
        kinds()[kind](torch.tensor([[3, 16]]), torch.float32)


@pytest.mark.parametrize("kind", kinds())
def test_compiled_and_exported(kind):
    positions = kinds()[kind].eval()
    ids = torch.tensor([[-1, 0, 9, 15], [3, 2, 1, 0]])
    expected = positions(ids, torch.float32)
    compiled = torch.compile(lambda p: positions(p, torch.float32), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected, rtol=0, atol=6e-8)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = positions

        def forward(self, ids):
            return self.positions(ids, torch.float32)

    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(Call(), (ids,), dynamic_shapes=({1: length},))
    torch.testing.assert_close(program.module()(ids[:, :3]), expected[:, :3], rtol=0, atol=6e-8)
    if kind == "sinusoidal":
        far = torch.tensor([[999_999, 123_456]] * 2)
        torch.testing.assert_close(program.module()(far), positions(far, torch.float32), rtol=0, atol=6e-8)


@pytest.mark.parametrize("error", [0.3, 1e-2, 1e-5])
@pytest.mark.parametrize(("length", "width"), [(96, 32), (20, 32)])
def test_the_sinusoidal_table_at_a_given_error(length, width, error):
    rank = sinusoidal_rank(length, width, error)
    table = encodings.sinusoids(torch.arange(length), width)
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    tail = lambda r: float((s[r:].square().sum() / s.square().sum()).sqrt())  # noqa: E731
    assert tail(rank) <= error * (1 + 1e-6) < tail(rank - 1) * (1 + 1e-5)
    positions = LowRankPositions(width, length, rank, error)
    assert positions.distance() == pytest.approx(tail(rank), abs=1e-6)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    rows = positions(torch.arange(length)[None], torch.float64)[0]
    torch.testing.assert_close(rows, best, rtol=0, atol=1e-5)
    assert f"rank={rank}" in repr(positions)
    assert positions.unit


def test_a_random_low_rank_table_has_the_size_of_embeddings():
    torch.manual_seed(0)
    positions = LowRankPositions(64, 256, 16)
    for std in (0.02, 0.5):
        positions.initialize(std)
        rows = positions(torch.arange(256)[None], torch.float32)
        assert rows.std().item() == pytest.approx(std, rel=0.1)
        assert torch.linalg.matrix_rank(rows[0], rtol=1e-5) == 16
    assert not positions.unit
    assert positions.distance() > 0.5


def config(kind, **more):
    fields = {"hidden_size": 8, "max_position_embeddings": 16, "position_rank": None, "position_error": None}
    return SimpleNamespace(position_encoding=kind, **{**fields, **more})


def test_make_positions():
    assert make_positions(config("rotary")) is None
    assert make_positions(config("none")) is None
    assert len(make_positions(config("sinusoidal")).table) == 16
    assert make_positions(config("learned")).position_embeddings.weight.shape == (16, 8)
    assert make_positions(config("low_rank")).rank == 8
    assert make_positions(config("low_rank", max_position_embeddings=1000, hidden_size=200)).rank == encodings.RANK
    assert make_positions(config("low_rank", position_rank=2)).rank == 2
    by_error = make_positions(config("low_rank", position_error=0.05))
    assert by_error.rank == sinusoidal_rank(16, 8, 0.05)
    assert by_error.distance() <= 0.05


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown position_encoding 'alibi'; expected one of rotary"):
        make_positions(config("alibi"))
    with pytest.raises(ValueError, match="at most rank 8, got 9"):
        LowRankPositions(8, 16, 9)
    with pytest.raises(ValueError, match="must lie in"):
        LowRankPositions(8, 16, 2, error=1.5)
    with pytest.raises(ValueError, match="must lie in"):
        sinusoidal_rank(16, 8, 0.0)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="length must be a whole number"):
            LearnedPositions(8, wrong)
