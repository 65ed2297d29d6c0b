"""Pictures of a head: the figures in them, and what cannot be drawn."""

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaModel

from hf_tfast.attention.quantized import Quantized
from hf_tfast.attention.svd import SVD
from hf_tfast.attention.window import Window
from hf_tfast.benchmarking.inspect import inspect

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 30,
}
TEXT = " ".join(f"w{n * 7 % 20}" for n in range(18))


@pytest.fixture(scope="module", params=["bert", "llama"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    if request.param == "bert":
        BertModel(BertConfig(**SIZES, max_position_embeddings=40)).save_pretrained(folder)
    else:
        LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(20))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_picture(model, tmp_path):
    out = tmp_path / "new" / "head.png"
    figures = inspect(str(model), TEXT, Window(window=4), out, layer=1, head=3)
    causal = model.name.startswith("llama")
    pairs = sum(min(n + 1, 4) for n in range(20)) if causal else sum(min(n, 4) + min(19 - n, 4) + 1 for n in range(20))
    assert figures["tokens"] == 20
    assert figures["density"] == pytest.approx(pairs / (210 if causal else 400))
    assert figures["density"] / 3 < figures["recall"] < 1, "small random weights: nearly even attention"
    content = out.read_bytes()
    assert content[:4] == b"\x89PNG"
    assert len(content) > 20_000
    with pytest.raises(FileExistsError, match="head.png exists"):
        inspect(str(model), TEXT, Window(window=4), out)


def test_everything_read_is_all_the_weight(model, tmp_path):
    figures = inspect(str(model), TEXT, Window(window=20), tmp_path / "all.png")
    assert figures["density"] == 1
    assert figures["recall"] == pytest.approx(1)


def test_refusals(model, tmp_path):
    out = tmp_path / "no.png"
    causal = model.name.startswith("llama")
    for arguments, words in (
        ({"layer": 2}, r"no layer 2 of stack .*layers with self-attention: \w+\.0, \w+\.1"),
        ({"head": 4}, "heads 0 to 3, got 4"),
        ({"stack": "nowhere"}, "no layer 0 of stack 'nowhere'"),
        ({"mechanism": Quantized()}, "is no pattern of pairs"),
        ({"mechanism": SVD()}, "no causal form" if causal else "is no pattern of pairs"),
        ({"out": tmp_path / "no.jpg"}, "must name a .png file"),
        ({"text": TEXT * 200}, "a picture takes at most 2048"),
    ):
        given = {"text": TEXT, "mechanism": Window(window=4), "out": out, **arguments}
        with pytest.raises(ValueError, match=words):
            inspect(str(model), given.pop("text"), given.pop("mechanism"), given.pop("out"), **given)
    if not causal:
        with pytest.raises(ValueError, match="has 54 tokens, .* reads 40"):
            inspect(str(model), " ".join(["w1"] * 52), Window(window=4), out)
    assert not list(tmp_path.iterdir())
