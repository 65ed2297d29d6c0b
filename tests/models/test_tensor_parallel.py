"""Tensor parallelism by Transformers' own DistributedConfig on two processes: outputs and gradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch.distributed as dist
from hf_tfast import Dense, TFastForCausalLM, TFastForMaskedLM
from hf_tfast.testing import assert_near
from tests.models.tiny_tfast import logits, make, small, tokens
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
FIELDS = [
    {"attention": small("random"), "attention_bias": True},
    {"attention": small("hashed"), "similarity": "cosine", "attention_gate": True, "mlp_gated": False},
    {"attention": [small("linformer"), small("nystrom")], "linformer_projection": "learned", "nystrom_kernel": 3},
]
for number, fields in enumerate(FIELDS):
    cls = TFastForMaskedLM if number == 2 else TFastForCausalLM
    one, ids, folder = make(cls, number, **fields), tokens(2, 40), f"{sys.argv[1]}/{number}"
    if dist.get_rank() == 0:
        one.save_pretrained(folder)
    dist.barrier()
    two = cls.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    assert two.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
    assert_near(logits(two, ids), logits(one, ids), f"logits of {fields}")
    for model in (one, two):
        model(ids, labels=ids).loss.backward()
    for (name, there), here in zip(two.named_parameters(), one.parameters(), strict=True):
        gradient = there.grad.full_tensor() if hasattr(there.grad, "full_tensor") else there.grad
        assert_near(gradient, here.grad, f"{name} of {fields}", 1e-4)
dist.destroy_process_group()
print("ALL EQUAL")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "run.py"), str(tmp_path)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.stdout.count("ALL EQUAL") == 2, done.stderr[-3000:]
    assert "match nothing" not in done.stderr
