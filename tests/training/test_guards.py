"""Launches that a CPU would silently turn into something else."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_tfast.training.guards import check_launch
from hf_tfast.training.layout import Layout

TWO = {"WORLD_SIZE": "2"}


def launched(device="cpu", world=1, fp16=False, fsdp=None, **more):
    return SimpleNamespace(device=torch.device(device), world_size=world, fp16=fp16, fsdp=fsdp, **more)


def cut(fields, **more):
    return {"world": 2, "layout": Layout(**fields), **more}


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ({"fp16": True}, {}, "fp16 on a CPU"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 on a CPU"),
        ({}, {"WORLD_SIZE": "2"}, "2 processes, but accelerate sees 1"),
        ({"world": 2}, {}, "1 processes, but accelerate sees 2"),
        (
            {},
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            "asked for several processes and started one",
        ),
        ({"fsdp": "full_shard"}, {}, "FSDP on a CPU"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP on a CPU"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed needs GPUs"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "megatron_lm needs GPUs"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config needs GPUs"),
        (cut({"shard": 2}, fsdp="full_shard"), TWO, "accelerate's own sharding, and the layout .shard 2. has one"),
        (cut({"shard": 2, "offload": True}), TWO, "offloading shards to CPU memory on a CPU moves nothing"),
        (cut({"shard": 2}, optim="adamw_bnb_8bit"), TWO, "adamw_bnb_8bit keeps its states in kernels"),
        (cut({"tensor": 2}, fp16=True, device="cuda"), TWO, "fp16 with tensor parallelism"),
    ],
)
def test_refused(arguments, environment, words):
    with pytest.raises(ValueError, match=words):
        check_launch(launched(**arguments), environment)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ({}, {}),
        ({"fsdp": []}, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"}),
        ({"world": 2}, {"WORLD_SIZE": "2"}),
        ({"world": 4}, {"OMPI_COMM_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}),
        ({}, {"ACCELERATE_USE_CPU": "True"}),
        ({"device": "cuda", "fp16": True, "fsdp": "full_shard"}, {"ACCELERATE_USE_DEEPSPEED": "true"}),
    ],
)
def test_allowed(arguments, environment):
    check_launch(launched(**arguments), environment)


FP16 = "from hf_tfast.training.arguments import PretrainingArguments as A; from hf_tfast.training.guards import *;"


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ("fp16=True, use_cpu=True", {}, "fp16 on a CPU"),
        (
            "",
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"},
            "accelerate sees 1. Several processes on a CPU: `torchrun",
        ),
    ],
)
@pytest.mark.slow
def test_what_accelerate_really_does(options, environment, words, tmp_path):
    """The true arguments in a fresh process, because accelerate's state lasts as long as a process."""
    code = f"{FP16} check_launch(A(output_dir={str(tmp_path)!r}, {options}))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
