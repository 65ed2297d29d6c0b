"""recipes/accelerate: every file is what accelerate reads, becomes the layout it names, and runs where a CPU can."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from hf_tfast.training.layout import Layout
from hf_tfast.training.scaling import ScalingArguments
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
    "--max_steps 3 --warmup_steps 0 --lr_scheduler_type constant --logging_steps 1 --save_steps 100 --eval_steps 100 "
    "--validation_sequences 2 --far 8 --plot false --disable_tqdm true --report_to none"
)


def launch(config, texts, out, *more):
    """The recipe under `accelerate launch`, on this machine's CPU."""
    recipe = FOLDER.parent / "pretrain_clm.py"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PARALLELISM_"))}
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{config}.yaml"),
         "--mixed_precision", "no", "--main_process_port", "0", str(recipe), "--text", str(texts),
         "--output_dir", str(out), "--use_cpu", "true", *SMALL, *more],
        capture_output=True, text=True, timeout=580, check=False, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_same_command_with_every_config(tmp_path):
    """The configuration alone changes; the losses do not."""
    texts, found = write_texts(tmp_path / "texts", count=12), {}
    for config, rows in (("cpu", 4), ("ddp", 2), ("fsdp2", 2), ("tensor_parallel", 4)):
        done = launch(config, texts, tmp_path / config, "--per_device_train_batch_size", str(rows))
        assert done.returncode == 0, done.stderr[-3000:]
        found[config] = result(tmp_path / config)
        record = json.loads((tmp_path / config / "metrics.json").read_text())
        assert record["tokens_seen"] == 3 * 4 * 32
    for config in ("ddp", "fsdp2", "tensor_parallel"):
        assert found[config]["loss"][:2] == pytest.approx(found["cpu"]["loss"][:2], rel=1e-6)
        assert found[config]["eval"] == pytest.approx(found["cpu"]["eval"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words"),
    [("fsdp2_offload", "needs GPUs|need a GPU"), ("gpu_fp16", "fp16 on a CPU")],
)
def test_what_a_cpu_cannot(tmp_path, config, words):
    import re

    texts = write_texts(tmp_path / "texts")
    more = ["--fp16", "true"] if config == "gpu_fp16" else []
    done = launch(config, texts, tmp_path / "out", *more)
    assert done.returncode != 0
    assert re.search(words, done.stderr)
    assert not (tmp_path / "out").exists()
