"""Fidelity: what is heard is what the model computes, the figures mean what they say, files and refusals."""

import json

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

from hf_tfast.attention import Mechanism, mechanisms
from hf_tfast.attention.quantized import Quantized
from hf_tfast.attention.svd import SVD
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking import captured, fidelity

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
    found = fidelity.standard()
    assert {m.name for m in found} >= {"window", "svd", "quantized"}
    assert len({fidelity.named(m) for m in found}) == len(found), "labels tell them apart"
    for name, field in fidelity.TURNED.items():
        assert all(field in given or name == "svd" for given in fidelity.BUDGETS[name])


def test_parse():
    assert fidelity.parse(["window:window=7,sinks=2"]) == [Window(window=7, sinks=2)]
    assert fidelity.parse(["svd"]) == [SVD(**given) for given in fidelity.BUDGETS["svd"]]
    assert fidelity.parse(["quantized:scheme=sine,queries=true"]) == [Quantized(scheme="sine", queries=True)]
    with pytest.raises(ValueError, match="unknown attention mechanism 'windows'"):
        fidelity.parse(["windows"])


def test_lines_of_the_plot():
    s = fidelity.Summary("topk", "TopK(k=32, block=16, window=8)", 0, 0, 0, 0, 0)
    assert fidelity._without_budget(s) == "TopK(block=16, window=8)"
    s = fidelity.Summary("svd", "SVD(rank=8, keys=32)", 0, 0, 0, 0, 0)
    assert fidelity._without_budget(s) == "SVD(rank=8)"


def test_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fidelity.BEGIN}\nold\n{fidelity.END}\nafter\n")
    for _ in range(2):
        fidelity.renew(page, "| new |")
        assert page.read_text() == f"before\n{fidelity.BEGIN}\n\n| new |\n{fidelity.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected one line"):
        fidelity.renew(page, "")


def test_refusals(tmp_path):
    folder = _save("bert", tmp_path / "model")
    with pytest.raises(ValueError, match="words holds no text"):
        fidelity.fidelity(measure(folder, Window(), texts=["", " "], out=tmp_path / "out"), print)
    with pytest.raises(ValueError, match="expected length >= 2"):
        fidelity.fidelity(measure(folder, Window(), length=1, out=tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="exists"):
        fidelity.fidelity(measure(folder, Window(), out=folder), print)
