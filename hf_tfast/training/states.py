"""Weights and optimiser states that are cut over processes: whole in files, in parts in memory.

A file holds what one process would have written, with the names of the parameters beside it, so that a checkpoint of
one layout is read under any other.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.utils import get_total_norm

__all__ = [
    "free_copies",
    "gather_states",
    "gradient_norm",
    "held_bytes",
    "is_cut",
    "match_schedule",
    "read_weights",
    "scatter_states",
]

NAMES = "names"


def is_cut(model: nn.Module) -> bool:
    """Are weights cut over processes? Parameters alone do not tell: FSDP2 has whole copies in their place until the
    backward pass, and keeps those of some modules (of a model without stacks of layers: all) after an evaluation."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def free_copies(model: nn.Module) -> None:
    """Put the parts, which optimisers know and files are read into, back in the place of FSDP2's whole copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, buffers and states of the optimiser, the parts that this process holds."""
    free_copies(model)
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    local = (x.to_local() if isinstance(x, DTensor) else x for x in [*model.parameters(), *model.buffers(), *states])
    return sum(x.nbytes for x in local)


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The norm of all gradients together, over all parts of cut ones. Every process that has a part must call it."""
    meshes = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            meshes[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p.grad)
    norms = [_whole(get_total_norm(gradients)).double() for gradients in meshes.values()]
    return float(torch.stack(norms).norm()) if norms else 0.0


def gather_states(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool) -> dict[str, Any]:
    """The state_dict of a process that holds everything, on the CPU, and `names` of its parameters in order.

    Tensors are gathered one at a time; processes that do not `keep` take part and hold nothing.
    """
    free_copies(model)
    known = {p: name for name, p in model.named_parameters()}
    names: list[str] = []
    state, groups = {}, []
    for group in optimizer.param_groups:
        first = len(names)
        for p in group["params"]:
            whole = {key: _whole(value) for key, value in optimizer.state.get(p, {}).items()}
            if keep and whole:
                state[len(names)] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in whole.items()}
            names.append(known[p])
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append({**rest, "params": list(range(first, len(names)))})
    return {"state": state, "param_groups": groups, NAMES: names}


def scatter_states(saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """`saved` of any layout -> the state_dict that this optimiser loads. ValueError where the parameters differ."""
    free_copies(model)
    names = saved[NAMES]
    numbers = {name: n for n, name in enumerate(names)}
    known = {p: name for name, p in model.named_parameters()}
    options = {n: group for group in saved["param_groups"] for n in group["params"]}
    mine = [known[p] for group in optimizer.param_groups for p in group["params"]]
    if set(mine) != set(names):
        different = sorted(set(mine) ^ set(names))
        raise ValueError(
            f"the checkpoint's optimiser trained other parameters than this model has; {different[0]} is one of "
            f"{len(different)} that only one of them has"
        )
    state, groups, count = {}, [], 0
    for group in optimizer.param_groups:
        there = options[numbers[known[group["params"][0]]]] if group["params"] else group
        rest = {key: value for key, value in there.items() if key != "params"}
        for n, p in enumerate(group["params"], count):
            found = saved["state"].get(numbers[known[p]])
            if found is not None:
                state[n] = {key: _part(value, p) for key, value in found.items()}
        groups.append({**rest, "params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    return {"state": state, "param_groups": groups}


def match_schedule(
    schedule: dict[str, Any], saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """The state of a learning rate schedule, whose lists have an entry for every group of parameters: layouts group
    them differently, so each of this optimiser's groups takes the entries of the one its parameters come from."""
    free_copies(model)
    known = {p: name for name, p in model.named_parameters()}
    groups = [{saved[NAMES][n] for n in group["params"]} for group in saved["param_groups"]]
    filled = [n for n, group in enumerate(groups) if group]
    sources = []
    for number, group in enumerate(optimizer.param_groups):
        first = known[group["params"][0]] if group["params"] else None
        sources.append(next((n for n in filled if first in groups[n]), min(number, len(groups) - 1)))
    return {
        key: [value[n] for n in sources] if isinstance(value, list) and len(value) == len(groups) else value
        for key, value in schedule.items()
    }


def read_weights(folder: Path, model: nn.Module) -> None:
    """Every parameter and saved buffer from the folder's safetensors. ValueError where a parameter is not there."""
    free_copies(model)
    files = sorted(folder.glob("*.safetensors"))
    missing = {name for name, _ in model.named_parameters()}
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 no mapping
                    if name in targets:
                        targets[name].copy_(_part(opened.get_tensor(name), targets[name]))
                        missing.discard(name)
    if missing:
        raise ValueError(f"{folder} has no weights for {sorted(missing)[0]} ({len(missing)} parameters are missing)")


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, like: Tensor) -> Any:
    """This process's part of a tensor that belongs to `like`; numbers and what is not cut stay whole."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    whole = distribute_tensor(value.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    return whole.redistribute(placements=like.placements)
