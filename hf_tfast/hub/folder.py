"""The card of a saved model, from its folder: weights are not read, so large models take no longer than small ones."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import hf_tfast

from ..integration.plan import FastPlan
from ..integration.quantizer import FastQuantizer
from .card import model_card
from .remote import CODE, is_standalone

__all__ = ["skeleton", "write_card"]


def write_card(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    name: str | None = None,
    results: Sequence[str | Path] = (),
    overwrite: bool = False,
    **metadata: Any,
) -> Path:
    """Write README.md for the model saved in `folder`, and return it.

    out         another folder for the card; config.json goes there too, from which the card can be made again.
    name        of the model on the Hub; the folder's name when not given.
    metadata    as in `model_card`.

    FileExistsError for a README.md that is there, unless `overwrite`; ValueError as `model_card`.
    """
    folder = Path(folder)
    target = Path(out or folder) / "README.md"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; replace it with --overwrite, or name another folder with --out")
    code = folder / CODE
    remote_code = code.is_file() and is_standalone(code.read_text(encoding="utf-8"))
    called = name or folder.resolve().name
    card = model_card(skeleton(folder), called, results=results, remote_code=remote_code, **metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    card.save(target)
    if target.parent.resolve() != folder.resolve():
        shutil.copyfile(folder / "config.json", target.parent / "config.json")
    return target


def skeleton(folder: str | Path) -> PreTrainedModel:
    """The model of a folder without its weights, on the meta device, with its plan. No code of the folder runs.

    ValueError where config.json is missing or names no class that is known here.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: it is no saved model")
    config = AutoConfig.from_pretrained(folder)
    name = next(iter(config.architectures or []), None)
    cls = None if name is None else getattr(hf_tfast, name, None) or getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder}/config.json names the class {name!r}, which neither Transformers nor hf_tfast has")
    plan = getattr(config, "quantization_config", None)
    if plan is None:
        with torch.device("meta"):
            return cls(config)
    quantizer = FastQuantizer(plan if isinstance(plan, FastPlan) else FastPlan.from_dict(plan), pre_quantized=True)
    quantizer.update_attn_implementation(config)
    with torch.device("meta"):
        model = cls(config)
    quantizer._process_model_before_weight_loading(model)
    quantizer._process_model_after_weight_loading(model)
    return model
