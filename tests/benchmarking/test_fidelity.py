"""Fidelity: what is heard is what the model computes, the figures mean what they say, files and refusals."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)

from hf_tfast.attention import Mask, Mechanism, mechanisms
from hf_tfast.attention.hashed import Hashed
from hf_tfast.attention.quantized import Quantized
from hf_tfast.attention.random import Random
from hf_tfast.attention.svd import SVD
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import budgets, captured, fidelity, fidelity_pages
from hf_tfast.benchmarking.pages import renewed

ROOT = Path(__file__).parents[2]
WORDS = [f"w{n}" for n in range(40)]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 45,
}


@pytest.fixture(scope="module", params=["bert", "llama"])
def model(request, tmp_path_factory):
    """A folder with a tiny random model and a tokenizer of 40 words."""
    return _save(request.param, tmp_path_factory.mktemp(request.param))


def _save(kind, folder):
    torch.manual_seed(3)
    made = {
        "bert": lambda: BertModel(BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.6)),
        "llama": lambda: LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.6)),
        "mistral": lambda: MistralModel(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)),
    }[kind]()
    made.save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def text(words, seed=0):
    numbers = torch.randint(40, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[n] for n in numbers)


def measure(model, *who, **more):
    given = {"model": str(model), "name": "tiny", "texts": [text(50), text(40, 1)], "corpus": "words", "length": 48}
    return fidelity.Request(**{**given, "who": who, "plots": False, **more})


def of(records, kind="fidelity"):
    return [record for record in records if record["kind"] == kind]


def test_listening_changes_nothing(model):
    loaded, tokenizer = captured.load(str(model))
    ids = tokenizer(text(30), return_tensors="pt")["input_ids"]
    calls = []
    with torch.no_grad(), captured.listening(loaded, calls.append):
        states = loaded(input_ids=ids).last_hidden_state
    with torch.no_grad():
        loaded(input_ids=ids)
        usual = AutoModel.from_pretrained(model, attn_implementation="sdpa").eval()(input_ids=ids).last_hidden_state
    assert torch.equal(states, usual)
    assert [(call.layer, call.q.shape[2]) for call in calls] == [(0, 32), (1, 32)], "and nobody listens afterwards"


def test_figures_are_those_of_the_models_own_weights(model, tmp_path):
    """Recall and density of a window against the weights that Transformers' eager attention gives."""
    who = Window(window=5)
    _, records = fidelity.fidelity(measure(model, who, out=tmp_path / "out", documents=1), print)
    eager = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    row = AutoTokenizer.from_pretrained(model)(text(50), truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        maps = eager(input_ids=row["input_ids"], output_attentions=True).attentions
    at = torch.arange(48)
    causal = isinstance(eager, LlamaModel)
    back = at[:, None] - at
    seen = (back >= 0) & (back < 5) if causal else back.abs() <= 5
    for record, weights in zip(of(records), maps, strict=True):
        assert record["recall"] == pytest.approx((weights * seen).sum(-1).mean().item(), rel=1e-4)
        assert record["density"] == pytest.approx(seen.sum().item() / (48 * 49 / 2 if causal else 48 * 48))
        assert 0.05 < record["error"] < 2


def test_budgets_order_errors_and_the_full_one_is_exact(model, tmp_path):
    who = [Window(window=n) for n in (2, 10, 25, 48)]
    folder, records = fidelity.fidelity(measure(model, *who, out=tmp_path / "out"), print)
    found = fidelity.summaries(records)
    errors, recalls = [s.error for s in found], [s.recall for s in found]
    assert errors == sorted(errors, reverse=True)
    assert recalls == sorted(recalls)
    assert found[-1].error < 1e-5
    assert found[-1].recall == pytest.approx(1)
    assert found[-1].density == 1
    assert all(s.worst >= s.error for s in found)
    assert {record["documents"] for record in of(records)} == {2}
    assert [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()] == records


def test_every_mechanism_runs_or_says_why(model, tmp_path):
    who = [cls(**cls.small) for cls in mechanisms().values()]
    folder, records = fidelity.fidelity(measure(model, *who, out=tmp_path / "out", plots=True), print)
    named = {fidelity.named(m): m for m in who}
    ran, skipped = {r["label"] for r in of(records)}, {r["label"] for r in of(records, "skipped")}
    assert ran | skipped == set(named)
    assert not ran & skipped
    assert all(not named[name].causal for name in skipped)
    for record in of(records):
        assert 0 <= record["error"] < 10
        patterned = type(named[record["label"]]).allowed is not Mechanism.allowed
        assert (record["density"] is not None) == patterned
    assert (folder / "error.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder / "table.md").read_text()
    assert all(f"`{name}`" in table for name in named)
    assert "Machine: " in table


def test_layers_with_a_window_of_their_own_are_left_out(tmp_path):
    loaded, tokenizer = captured.load(str(_save("mistral", tmp_path)))
    calls = []
    for words in (5, 30):
        with torch.no_grad(), captured.listening(loaded, calls.append):
            loaded(input_ids=tokenizer(text(words), return_tensors="pt")["input_ids"])
    assert [call.q.shape[2] for call in calls] == [7, 7], "only where the window holds the whole row"


def test_positions_are_extended(tmp_path):
    folder = _save("bert", tmp_path / "model")
    request = measure(folder, Window(window=8), texts=[text(150)], length=100, out=tmp_path / "out")
    assert of(fidelity.fidelity(request, print)[1], "input")[0]["tokens"] == [100]


def test_standard_budgets_are_mechanisms():
    found = fidelity.standard(128)
    assert {m.name for m in found} >= {"window", "svd", "quantized"}
    assert len({fidelity.named(m) for m in found}) == len(found), "labels tell them apart"
    for name, field in budgets.TURNED.items():
        assert all(field in given or name == "svd" for given in budgets.FIDELITY[name])


def test_parse():
    assert fidelity.parse(["window:window=7,sinks=2"], 128) == [Window(window=7, sinks=2)]
    assert fidelity.parse(["svd"], 128) == [SVD(**given) for given in budgets.FIDELITY["svd"]]
    assert fidelity.parse(["quantized:scheme=sine,queries=true"], 128) == [Quantized(scheme="sine", queries=True)]
    with pytest.raises(ValueError, match="unknown attention mechanism 'windows'"):
        fidelity.parse(["windows"], 128)


def test_lines_of_the_plot():
    s = fidelity_pages.Summary("topk", "TopK(k=32, block=16, window=8)", 0, 0, 0, 0, 0)
    assert fidelity_pages._without_budget(s) == "TopK(block=16, window=8)"
    s = fidelity_pages.Summary("svd", "SVD(rank=8, keys=32)", 0, 0, 0, 0, 0)
    assert fidelity_pages._without_budget(s) == "SVD(rank=8)"


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_the_same_density(causal):
    """A window is its own: nothing that it reads lies beyond. Others are met to within one key on each side."""
    at = torch.arange(90)
    few = torch.tensor([0, 30, 89])
    before = at <= few[:, None] if causal else torch.ones(3, 90, dtype=torch.bool)
    seen = ((at - few[:, None]).abs() <= 12) & before
    assert torch.equal(fidelity.window_of(seen.expand(1, 2, -1, -1), before, few), seen)
    drawn = (torch.rand(1, 2, 3, 90) < 0.3) & before
    window = fidelity.window_of(drawn, before, few)
    wanted = drawn.sum() / 2
    assert wanted <= window.sum() <= wanted + 6
    assert not fidelity.window_of(torch.zeros_like(drawn), before, few).any()


def test_far_keys():
    """Of what lies beyond an equally dense window: a window finds nothing, drawn pairs their share, Hashed more."""
    call = fidelity.retrieval(512, heads=4, width=32)
    window = fidelity.compare(call, Window(window=40))
    assert window["found"] == 0
    assert window["far"] == pytest.approx(1 - window["recall"])
    drawn = fidelity.compare(call, Random(window=1, sinks=0, blocks=4, block=8))
    assert drawn["found"] == pytest.approx(drawn["density"], rel=0.3)
    hashed = fidelity.compare(call, Hashed(bits=4, rounds=2, cap=64, window=4))
    assert hashed["found"] > 2 * hashed["density"]
    seen, before = fidelity.pairs(Window(window=512), call.q, call.k, Mask(), torch.arange(512), None)
    mass = fidelity.weights(call, torch.arange(512), before)
    torch.testing.assert_close((mass * seen) @ call.v, call.o, rtol=1e-4, atol=1e-5)


def test_recall_grows_with_rounds_and_is_on_the_page(model, tmp_path):
    who = [Hashed(bits=3, rounds=n, cap=8, window=2) for n in (1, 4, 16)]
    folder, records = fidelity.fidelity(measure(model, *who, out=tmp_path / "out", plots=True), print)
    made_up = [s.recall for s in fidelity_pages.summaries(records, "made up")]
    on_text = [s.recall for s in fidelity.summaries(records)]
    assert made_up == sorted(made_up)
    assert on_text == sorted(on_text)
    text = (folder / "table.md").read_text()
    assert "Recall of attention mass over rounds" in text
    assert "Far keys" in text
    assert (folder / "hashed.png").read_bytes()[:4] == b"\x89PNG"
    assert len(of(records, "made up")) == 3


def test_an_interrupted_run_is_continued(model, tmp_path, monkeypatch):
    who = [Window(window=5), Hashed(bits=2, rounds=2, cap=8, window=2)]
    whole, wanted = fidelity.fidelity(measure(model, *who, out=tmp_path / "whole"), print)
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(fidelity.time, "monotonic", lambda: next(clock))
    out = tmp_path / "out"
    with pytest.raises(TimeoutError, match="--resume"):
        fidelity.fidelity(measure(model, *who, out=out, minutes=1.2), print)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="--resume"):
        fidelity.fidelity(measure(model, *who, out=out), print)
    compared, original = [], fidelity.compare
    monkeypatch.setattr(fidelity, "compare", lambda *given: compared.append(given) or original(*given))
    _, records = fidelity.fidelity(measure(model, *who, out=out, resume=True), print)
    assert of(records) == of(wanted)
    assert of(records, "made up") == of(wanted, "made up")
    assert 0 < len(compared) < 10, "what was measured is not measured again"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_the_committed_page_says_what_the_committed_records_say():
    folder, page = ROOT / "docs" / "results" / "fidelity-minilm", ROOT / "docs" / "fidelity.md"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    text = page.read_text(encoding="utf-8")
    assert renewed(text, "fidelity", fidelity.markdown(records)) == text
    assert (folder / "table.md").read_text(encoding="utf-8") == fidelity.markdown(records)
    measured = {r["mechanism"] for r in records if r["kind"] == "fidelity"}
    assert measured == set(mechanisms()) - {"dense"}, "a mechanism is missing from docs/fidelity.md"


def test_refusals(tmp_path):
    folder = _save("bert", tmp_path / "model")
    with pytest.raises(ValueError, match="words holds no text"):
        fidelity.fidelity(measure(folder, Window(), texts=["", " "], out=tmp_path / "out"), print)
    with pytest.raises(ValueError, match="expected length >= 2"):
        fidelity.fidelity(measure(folder, Window(), length=1, out=tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="exists"):
        fidelity.fidelity(measure(folder, Window(), out=folder), print)
