"""The recipes as a user starts them: two steps on small texts, in this process and under `accelerate launch`."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.training.tiny import RECIPES, load, write_texts

SMALL = shlex.split(
    "--tokenizer bytes --length 32 --hidden_size 16 --layers 1 --heads 2 --intermediate_size 32 --max_steps 2 "
    "--validation_sequences 2 --far 8 --plot false --disable_tqdm true"
)
NAMES = ("pretrain_clm", "pretrain_mlm")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, texts, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--text", str(texts), "--output_dir", str(out), "--use_cpu", "true", "--attention", "window", *SMALL]
    (record,) = load(name).main(given)
    assert record["steps"] == 2
    assert (out / "model" / "config.json").is_file()
    said = capsys.readouterr().out
    assert f"{record['attention']}: {record['sample']['prompt']}" in said


ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "bf16",
              "--dynamo_backend", "no", "--num_processes"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(how, processes, texts, out, *more):
    given = [str(RECIPES / "pretrain_clm.py"), "--text", str(texts), "--output_dir", str(out), *SMALL, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *how, str(processes), *given],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=env,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "processes", "more"),
    [(ACCELERATE, 1, []), (TORCHRUN, 2, ["--use_cpu", "true", "--bf16", "true"])],
    ids=["accelerate", "torchrun"],
)
def test_launched(texts, tmp_path, how, processes, more):
    """Two processes see twice as much, and evaluate every held-out sequence once."""
    done = launch(how, processes, texts, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["tokens_seen"] == 2 * 32 * processes
    assert record["training"]["world_size"] == processes
    assert record["training"]["mixed_precision"] == "bf16"
    assert record["final"]["eval_targets"] == 62


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"), [(ACCELERATE, "started one"), (TORCHRUN, "accelerate sees 1")], ids=["accelerate", "torchrun"]
)
def test_processes_that_would_be_alone(texts, tmp_path, how, words):
    done = launch(how, 2, texts, tmp_path / "out")
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_thin_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert text.startswith("# /// script\n")
    assert re.search(rf"accelerate launch [^\n]*recipes/{path.name}", text)


@pytest.mark.parametrize("name", NAMES)
def test_documented_commands_parse(name):
    """Every command of the docstring is one that the recipe understands."""
    from transformers import HfArgumentParser

    module = load(name)
    text = module.__doc__.replace("\\\n", " ") + "\n\n"
    commands = re.findall(r"accelerate launch ([^`]*?)\n\n", text, re.S)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("\n", " "))
        given = words[words.index(f"recipes/{name}.py") + 1 :]
        parser = HfArgumentParser((module.DataArguments, module.ModelArguments, module.PretrainingArguments))
        parser.parse_args_into_dataclasses([*given, "--use_cpu", "true"])
