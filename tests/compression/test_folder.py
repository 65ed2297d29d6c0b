"""tfast convert: a folder into a folder; plans in words and in JSON."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_tfast import Activation, FastPlan, LowRank, Pruned, TFastConfig, TFastForMaskedLM, Window, cli
from hf_tfast.compression import folder
from hf_tfast.compression.folder import model_class, read_batches, read_plan
from hf_tfast.training.tokens import byte_tokenizer
from tests.integration.tiny_models import GROUPED, inputs, output, tiny

TEXT = "".join(f"{n} bottles of beer on the wall; " for n in range(400))


@pytest.fixture
def dense(tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": 300})).save_pretrained(tmp_path / "dense")
    byte_tokenizer(2048).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def tfast(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tfast", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        return code, *capsys.readouterr()

    return call


def test_a_folder_becomes_a_folder(dense, tfast):
    code, out, err = tfast(
        "convert", dense / "dense", "--attention", "window:window=16,sinks=2", "--feed-forward",
        "pruned:ratio=0.5,method=activation,recover=true + low_rank:ratio=0.6,method=activation",
        "--calibration", dense / "text.txt", "--out", dense / "fast", "--length", "64", "--tokens", "1024",
        "--rounds", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["linears"] == {"pruned + low_rank": 6}
    assert found["basis"]["held_out"]
    assert found["basis"]["tokens"] == 256
    assert json.loads((dense / "fast" / "conversion" / "report.json").read_text())["facts"] == found["facts"]
    model = AutoModelForCausalLM.from_pretrained(dense / "fast")
    assert model.config.quantization_config.attention == Window(window=16, sinks=2)
    ids = AutoTokenizer.from_pretrained(dense / "fast")("beer on", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


def test_the_table_and_a_plan_file(dense, tfast):
    plan = FastPlan(feed_forward={"1": LowRank(rank=4)})
    (dense / "plan.json").write_text(plan.to_json_string())
    code, out, _ = tfast("convert", dense / "dense", "--plan", dense / "plan.json", "--out", dense / "fast")
    assert code == 0
    assert "3 feed-forward linears low_rank, 0 attention, output head kept" in out
    assert out.rstrip().endswith(f"Written to {dense / 'fast'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to do"),
        (("--feed-forward", "low_rank:ratio=0.5,method=activation"), "give calibration"),
        (("--feed-forward", "low_rank:rank=99"), "above its 32"),
        (("--feed-forward", "smaller"), "unknown feed-forward form 'smaller'"),
        (("--feed-forward", "low_rank:rank"), "field=value"),
        (("--attention", "window", "--calibration", "missing.txt"), "missing.txt"),
        (("--attention", "window", "--calibration", "empty.txt"), "empty"),
        (("--attention", "window", "--dtype", "int3"), "dtype must be one of"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(arguments, message, dense, tfast, monkeypatch):
    monkeypatch.chdir(dense)
    (dense / "empty.txt").write_text("")
    code, _, err = tfast("convert", "dense", "--out", "fast", *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert sorted(p.name for p in dense.iterdir()) == ["dense", "empty.txt", "text.txt"]


def test_an_existing_folder_is_refused_before_anything_is_read(dense, tfast, monkeypatch):
    (dense / "fast").mkdir()
    monkeypatch.setattr(folder, "AutoConfig", None)
    code, _, err = tfast("convert", dense / "dense", "--attention", "window", "--out", dense / "fast")
    assert code == 2
    assert "exists" in err


def test_help_is_for_newcomers(tfast):
    code, out, _ = tfast("convert", "--help")
    assert code == 0
    assert all(word in out for word in ("--calibration", "--feed-forward", "low_rank", "--plan"))


def test_plans_in_words(tmp_path):
    assert read_plan(None, "window:window=8", None) == FastPlan(attention=Window(window=8))
    words = "pruned:ratio=0.5 + low_rank:energy=0.9 + activation:kind=binary,bits=3,limit=2.5"
    forms = [Pruned(ratio=0.5), LowRank(energy=0.9), Activation(kind="binary", bits=3, limit=2.5)]
    assert read_plan(None, None, words) == FastPlan(feed_forward=forms)
    file = tmp_path / "plan.json"
    file.write_text('{"attention": {"0": {"mechanism": "window", "window": 8}}}')
    assert read_plan(file, None, None) == FastPlan(attention={"0": Window(window=8)})
    file.write_text('{"attention": {"mechanism": "window"}, "sizes": {}}')
    with pytest.raises(ValueError, match="has sizes"):
        read_plan(file, None, None)
    with pytest.raises(ValueError, match="leave out --attention"):
        read_plan(file, "window", None)


def test_rows_of_text(dense):
    config, tokenizer = tiny("llama").config, byte_tokenizer(2048, two_way=True)
    batches = read_batches(TEXT, tokenizer, config, 64, 1024)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (16, 64)
    assert [len(batch["input_ids"]) for batch in batches] == [4] * 4
    inside = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert TEXT.startswith("".join(inside))
    (short,) = read_batches("a few words", tokenizer, config, 64, 1024)
    assert short["input_ids"].shape[0] == 1
    (pair,) = read_batches("a few words", tokenizer, tiny("bart").config, 64, 1024)
    assert torch.equal(pair["labels"], pair["input_ids"])
    with pytest.raises(ValueError, match="at least 8"):
        read_batches(TEXT, tokenizer, config, 4, 1024)


def test_the_class_of_the_checkpoint(tmp_path):
    config = TFastConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    config.architectures = ["TFastForMaskedLM"]
    assert model_class(config) is TFastForMaskedLM
    config.architectures = ["Unknown"]
    assert model_class(config).__name__ == "AutoModel"


def test_nothing_of_a_failed_save_stays(dense, monkeypatch):
    def fail(self, *given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", fail)
    plan = FastPlan(feed_forward=LowRank(rank=3))
    with pytest.raises(KeyboardInterrupt):
        folder.convert_folder(folder.Request(model=str(dense / "dense"), plan=plan, out=dense / "fast"))
    assert sorted(p.name for p in dense.iterdir()) == ["dense", "text.txt"]
    assert output(tiny("llama"), inputs("llama")) is not None
