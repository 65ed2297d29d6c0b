"""recipes/accelerate: every file is what accelerate reads, becomes the layout it names, and runs where a CPU can."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers import HfArgumentParser

from hf_tfast.training.arguments import DataArguments, ModelArguments, PretrainingArguments
from hf_tfast.training.layout import Layout
from hf_tfast.training.run import pretrain
from hf_tfast.training.scaling import ScalingArguments
from tests.parallel.ranks import run
from tests.parallel.trainings import result
from tests.training.tiny import write_texts

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
LAYOUTS = {  # file: what its processes do; files that are missing here leave the layout alone
    "fsdp2": {"shard": 2},
    "fsdp2_offload": {"shard": 2, "offload": True},
    "fsdp2_hybrid": {"shard": 2, "replicas": 2},
    "fsdp2_hybrid_multinode": {"shard": 8, "replicas": 2},
    "tensor_parallel": {"tensor": 2},
    "tensor_parallel_fsdp2": {"tensor": 2, "shard": 2},
    "tensor_parallel_fsdp2_multinode": {"tensor": 8, "shard": 2},
    "sequence_parallel": {"sequence": 2},
    "ddp": {"replicas": 2},
    "ddp_multinode": {"replicas": 16},
    "pipeline": {"replicas": 2},  # the flag makes it a pipeline
}


def environment(path, monkeypatch):
    """What `accelerate launch --config_file path` would put into the environment of the script."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        monkeypatch.setattr("accelerate.utils.launch.is_deepspeed_available", lambda: True, raising=False)
        return args, prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return args, {**prepare_multi_gpu_env(args), "WORLD_SIZE": str(args.num_processes)}
    return args, prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path, monkeypatch):
    config = load_config_from_file(str(path))
    args, made = environment(path, monkeypatch)
    assert args.num_processes == config.num_processes
    assert made["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision
    kinds = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp2": "ACCELERATE_USE_FSDP"}
    for name, variable in kinds.items():
        assert (made.get(variable) == "true") == (name in path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_becomes_its_layout(path, monkeypatch):
    _, made = environment(path, monkeypatch)
    layout = Layout.of(ScalingArguments(), made)
    assert layout == Layout(**LAYOUTS.get(path.stem, {}))
    layout.claim(made)
    assert "true" not in {made.get("ACCELERATE_USE_FSDP"), made.get("ACCELERATE_USE_PARALLELISM_CONFIG")}
    assert made.get("ACCELERATE_USE_DEEPSPEED") == ("true" if "deepspeed" in path.stem else None)


def test_accelerate_is_told_that_the_layout_is_taken(monkeypatch):
    """Otherwise it would ignore shards on a CPU, refuse tensor parallel, and wrap on a GPU what is cut already."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    for name, value in {**asked, "PARALLELISM_CONFIG_TP_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    arguments = ScalingArguments()
    arguments.share()
    assert (arguments.layout.tensor, arguments.layout.shard) == (2, 2)
    assert os.environ["ACCELERATE_USE_FSDP"] == os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "false"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_user_fills_in_is_marked(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    read = yaml.safe_load(text)
    several = read["num_machines"] > 1
    assert several == path.stem.endswith("_multinode") == ("FILL IN" in text)
    for line in text.splitlines():
        field = line.split(":")[0].strip()
        if several and field in {
            "num_machines",
            "num_processes",
            "machine_rank",
            "main_process_ip",
            "main_process_port",
        }:
            assert "# FILL IN: " in line, line


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        ({"tensor_parallel": 3}, {"WORLD_SIZE": "4"}, "needs a multiple of 3 processes, and the launcher started 4"),
        ({"tensor_parallel": 2}, {}, "launcher started 1"),
        ({"shard": 0}, {}, "--shard must be at least 1, got 0"),
        ({"tensor_parallel": 4}, {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor_parallel 4, but the config.* says 2"),
        ({}, {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "wrong ones with fast attention; use parallelism_config_sp_size"),
        ({}, {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "its distributed_type is not FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1 is not supported here, only 2"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({"tensor_parallel": 2, "replicas": 2}, {"WORLD_SIZE": "8"}, "multiply to 4, and the launcher started 8"),
        ({"average_every": 4}, {"ACCELERATE_USE_FSDP": "true"}, "needs whole models"),
        ({"average_every": 2, "average_delay": 2}, {}, "must be done before the next begins"),
        ({"average_delay": 1}, {}, "must be done before the next begins"),
        ({"average_every": 0}, {}, "at least 1"),
        ({"shard": 3}, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "shard 3 needs a multiple of 3 processes"),
        ({"pipeline_stages": 2}, {}, "ask for --pipeline_parallel too"),
        ({"shard": 2, "sequence_parallel": 2}, {"WORLD_SIZE": "4"}, "need whole weights in every process"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true", "WORLD_SIZE": "1"}, "belongs to shards"),
    ],
)  # fmt: skip
def test_contradictions_are_told(flags, variables, words, monkeypatch):
    given = {"WORLD_SIZE": "4", **variables} if variables and "WORLD_SIZE" not in variables else variables
    if any("PARALLELISM" in name for name in given):
        given["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        ScalingArguments(**flags).share()


SMALL = shlex.split(
    "--tokenizer bytes --length 32 --hidden_size 16 --layers 2 --heads 2 --intermediate_size 32 --attention window "
    "--max_steps 20 --warmup_steps 0 --lr_scheduler_type constant --logging_steps 1 --save_steps 100 --eval_steps 100 "
    "--validation_sequences 2 --far 8 --plot false --disable_tqdm true --report_to none --use_cpu true"
)
PIPELINE = ["--pipeline_parallel", "2"]
RUNS = {  # configuration: (rows of a process, flags behind the recipe); 4 rows a step in all
    "cpu": (4, []),
    "ddp": (2, []),
    "fsdp2": (2, []),
    "tensor_parallel": (4, []),
    "sequence_parallel": (4, []),
    "pipeline": (4, PIPELINE),
    "fsdp2_hybrid": (1, []),  # four processes from here on
    "tensor_parallel_fsdp2": (2, []),
}
MACHINES = {  # two launches on this machine play two machines: (rows, what a user fills in)
    "ddp_multinode": (2, "--num_processes 2"),
    "fsdp2_hybrid_multinode": (1, "--num_processes 4 --parallelism_config_dp_shard_size 2"),
    "tensor_parallel_fsdp2_multinode": (2, "--num_processes 4 --parallelism_config_tp_size 2"),
}


def command(config, texts, out, rows, before=(), behind=()):
    """`accelerate launch` of the recipe, as on the page about scaling; before and behind the recipe's name."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{config}.yaml"),
        "--mixed_precision", "no", *before, str(FOLDER.parent / "pretrain_clm.py"), "--text", str(texts),
        "--output_dir", str(out), "--per_device_train_batch_size", str(rows), *SMALL, *behind,
    ]  # fmt: skip


def start(given, log):
    """The command, begun; what it writes goes to a file, which no pipe of a killed process keeps open."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PARALLELISM_"))}
    with open(log, "w") as file:
        return subprocess.Popen(given, stdout=file, stderr=file, env={**environment, "OMP_NUM_THREADS": "1"})


def launch(config, texts, out, rows=4, behind=()):
    """(exit code, what it wrote) of a launch on this machine."""
    log = out.with_suffix(".log")
    process = start(command(config, texts, out, rows, ["--main_process_port", "0"], behind), log)
    return process.wait(timeout=500), log.read_text()


def assert_trained_alike(out, one):
    found, record = result(out), json.loads((out / "metrics.json").read_text())
    assert record["tokens_seen"] == 20 * 4 * 32
    assert len(found["loss"]) == 20
    assert found["loss"][:2] == pytest.approx(one["loss"][:2], rel=1e-6)  # before and after one step
    assert found["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert found["eval"] == pytest.approx(one["eval"], rel=1e-3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts", count=12)


@pytest.fixture(scope="module")
def one(texts, tmp_path_factory):
    """The training in one process, launched like the others."""
    out = tmp_path_factory.mktemp("runs") / "cpu"
    code, wrote = launch("cpu", texts, out)
    assert code == 0, wrote[-3000:]
    return result(out)


@pytest.mark.slow
@pytest.mark.parametrize("config", [name for name in RUNS if name != "cpu"])
def test_the_same_command_with_every_config(texts, one, tmp_path, config):
    """The configuration alone changes; the losses do not."""
    rows, flags = RUNS[config]
    code, wrote = launch(config, texts, tmp_path / "out", rows, flags)
    assert code == 0, wrote[-3000:]
    assert_trained_alike(tmp_path / "out", one)


@pytest.mark.slow
@pytest.mark.parametrize("config", list(MACHINES))
def test_several_machines(texts, one, tmp_path, config):
    rows, filled = MACHINES[config]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [*filled.split(), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    launches = [start(command(config, texts, tmp_path / "out", rows, [*meet, "--machine_rank", str(n)]), log)
                for n, log in enumerate(logs)]  # fmt: skip
    for process, log in zip(launches, logs, strict=True):
        assert process.wait(timeout=500) == 0, log.read_text()[-3000:]
    assert_trained_alike(tmp_path / "out", one)


def in_layout(texts, out, rows, flags):
    """On a rank: the recipe with what the launcher left in the environment."""
    parser = HfArgumentParser((DataArguments, ModelArguments, PretrainingArguments))
    given = [
        "--text",
        str(texts),
        "--output_dir",
        str(out),
        "--per_device_train_batch_size",
        str(rows),
        *SMALL,
        *flags,
    ]
    pretrain(*parser.parse_args_into_dataclasses([*given, "--max_steps", "3"]))
    return result(out)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sequence_parallel", "pipeline"])
def test_what_a_launch_leaves_in_the_environment(texts, tmp_path, config, monkeypatch):
    """As above without the launcher's own seconds: its variables, two processes, three steps."""
    rows, flags = RUNS[config]
    _, made = environment(FOLDER / f"{config}.yaml", monkeypatch)
    kept = {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "PARALLELISM_"))}
    kept |= {"ACCELERATE_MIXED_PRECISION": "no"}
    both = run(in_layout, 2, texts, tmp_path / "two", rows, flags, group=False, env=kept)
    alone = in_layout(texts, tmp_path / "one", 4, [])
    for found in both:
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ("fsdp2_offload", [], "its copies need a GPU"),
        ("gpu_fp16", ["--fp16", "true"], "fp16 on a CPU"),
        ("deepspeed_zero2", [], "[Dd]eep[Ss]peed"),
        ("tensor_parallel", ["--tensor_parallel", "4"], "--tensor_parallel 4, but the configuration .* says 2"),
        ("fsdp2", ["--shard", "3"], "shard 3 needs a multiple of 3 processes, and the launcher started 2"),
        ("sequence_parallel", ["--length", "33"], "sequence parallelism cuts rows of 33 tokens over 2 processes"),
        ("pipeline", ["--pipeline_parallel", "2", "--layers", "1"], "a pipeline of 2 processes needs as many layers"),
    ],
)
def test_what_is_refused(texts, tmp_path, config, flags, words):
    """Nothing is trained, and nothing is left behind."""
    code, wrote = launch(config, texts, tmp_path / "out", 4, flags)
    assert code != 0
    assert re.search(words, wrote), wrote[-3000:]
    assert not (tmp_path / "out").exists()
