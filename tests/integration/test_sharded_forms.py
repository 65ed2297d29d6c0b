"""Feed-forward forms under tensor parallelism: two processes give the outputs and gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfast import Activation, FastPlan, Int8, LowRank, Pruned, TensorTrain, Window, apply_plan
from hf_tfast.integration._sharding import check_shardable, cut_factors
from tests.integration.tiny_models import GROUPED, tiny

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import hf_tfast
from pathlib import Path
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
for folder in sorted(Path(sys.argv[1]).iterdir()):
    one = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(7))
    if folder.name == "int8":
        try:
            AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
        except ValueError as error:
            print(f"REFUSED by FSDP {folder.name}: {error}")
    try:
        two = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    except ValueError as error:
        print(f"REFUSED {folder.name}: {error}")
        continue
    for model in (one, two):
        model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        outputs = [model(ids).logits for model in (one, two)]
    error = float((outputs[0] - outputs[1]).abs().max())
    cut = []
    for (name, there), here in zip(two.named_parameters(), one.parameters(), strict=True):
        gradient = there.grad.full_tensor() if isinstance(there.grad, DTensor) else there.grad
        error = max(error, float((gradient - here.grad).abs().max()))
        if isinstance(there, DTensor) and ".mlp." in name and there.to_local().shape != there.shape:
            cut.append(f"{name.split('mlp.')[1]}:{tuple(there.to_local().shape)}")
    assert error <= 1e-6, (folder.name, error)
    two.save_pretrained(Path(sys.argv[2]) / folder.name)
    dist.barrier()
    if dist.get_rank() == 0:
        again = AutoModelForCausalLM.from_pretrained(Path(sys.argv[2]) / folder.name).eval()
        assert torch.equal(again(ids).logits, one(ids).logits)
        print("CUT", folder.name, *sorted(set(cut)))
    print("EQUAL", folder.name)
dist.destroy_process_group()
"""
PLANS = {
    "low_rank": LowRank(rank=6),
    "pruned": [Pruned(width=32), LowRank(rank=6)],
    "some": {"1": LowRank(rank=6)},
    "tensor_train": TensorTrain(ranks=4),
}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name, forms in PLANS.items():
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(**GROUPED))
        apply_plan(model, FastPlan(attention=Window(window=9), feed_forward=forms)).save_pretrained(
            tmp_path / "in" / name
        )
    model = apply_plan(tiny("llama"), FastPlan(feed_forward=Activation(limit=2.0)))
    model.save_pretrained(tmp_path / "in" / "activation")
    apply_plan(tiny("llama"), FastPlan(feed_forward=Int8())).save_pretrained(tmp_path / "in" / "int8")
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "run.py"), str(tmp_path / "in"), str(tmp_path / "out")],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    for name in PLANS:
        assert done.stdout.count(f"EQUAL {name}") == 2, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("REFUSED activation: Unsupported `tp_plan` styles: {") == 2
    assert (
        done.stdout.count(
            "REFUSED int8: Unsupported `tp_plan` styles: {'Int8(threshold=6.0) does not run under tensor parallelism"
        )
        == 2
    )
    assert (
        done.stdout.count(
            "REFUSED by FSDP int8: Unsupported `fsdp_plan` styles: {'Int8(threshold=6.0) does not run under FSDP"
        )
        == 2
    )
    factors = "down_proj.first.weight:(6, 24) gate_proj.second.weight:(24, 6) up_proj.second.weight:(24, 6)"
    assert f"CUT low_rank {factors}" in done.stdout
    assert "CUT pruned down_proj.first.weight:(6, 16)" in done.stdout
    assert f"CUT some {factors}" in done.stdout
    assert "match nothing" not in done.stderr


def rules(forms, name="llama"):
    plan = FastPlan(feed_forward=forms)
    model = apply_plan(tiny(name), plan)
    found = dict(model.tp_plan)
    cut_factors(model, plan, found)
    return {name.split("mlp.")[1]: style for name, style in found.items() if "mlp" in name}


def test_rules():
    dense = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    cut = {"gate_proj.second": "colwise", "up_proj.second": "colwise", "down_proj.first": "rowwise"}
    assert rules(Pruned(ratio=0.5)) == dense
    assert rules(LowRank(rank=4)) == rules({"0": LowRank(rank=4)}) == cut
    assert rules(TensorTrain(ranks=3)) == {}


@pytest.mark.parametrize(
    ("forms", "sharded", "converting", "message"),
    [
        (Activation(limit=1.0), {"_tp_size": 2}, False, "tensor parallelism"),
        (LowRank(rank=3), {"_fsdp_size": 2}, True, "convert in one process"),
        (LowRank(rank=3), {"_tp_size": 2}, True, "convert in one process"),
        (LowRank(rank=3), {"_tp_size": 2}, False, None),
        (Activation(limit=1.0), {"_fsdp_size": 2}, False, None),
        (Activation(limit=1.0), {"_tp_size": 1, "_fsdp_size": None}, True, None),
    ],
)
def test_what_cannot_be_sharded(forms, sharded, converting, message):
    model, plan = type("Model", (), sharded)(), FastPlan(feed_forward=forms)
    if message is None:
        check_shardable(model, plan, converting)
        return
    with pytest.raises(ValueError, match=message):
        check_shardable(model, plan, converting)
