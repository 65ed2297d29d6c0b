"""The plug-in that makes Transformers carry a plan: applied while loading, saved in config.json, read by AutoModel.

A model whose weights hold no integers does not pretend to be quantised: `is_quantized` is False after loading.
"""

from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils import logging

from ._basis import check_loaded, expect_basis, lacking
from ._forms import Sizes, build_forms, check_filled, finish_forms, make_forms, planned_blocks
from ._inner import WithBase
from ._modules import parts_of
from ._sharding import check_places, check_shardable, cut_factors, forbid
from ._stamps import NAME, set_stamp, stamped_modules
from .apply import attach, saved, stamp_model
from .plan import FastPlan

__all__ = ["FastQuantizer", "register_plan"]

logger = logging.get_logger(__name__)


class FastQuantizer(WithBase):
    """Applies a FastPlan in from_pretrained. `pre_quantized`: the checkpoint has the plan already."""

    quantization_config: FastPlan

    def __init__(self, quantization_config: FastPlan, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: PreTrainedModel | None = None  # while it is loading
        self.asked: str | None = None  # attn_implementation, where the user named another one
        self.basis: list[str] = []  # buffers that the checkpoint has to fill
        self.expected: list[str] = []  # tensors of feed-forwards that the checkpoint has to fill
        self.sizes: Sizes | None = None  # of feed-forwards, made from weights
        self.implementation: str | dict[str, Any] = NAME  # what config.json says about it

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Seen before the model is built: what did the user ask for?"""
        if getattr(config, "output_attentions", False):
            raise ValueError("output_attentions=True cannot be honoured by a plan: attention weights are never formed")
        asked = {part._attn_implementation for _, part in parts_of(config)} - {None, NAME}
        text = config.get_text_config()._attn_implementation if len(asked) > 1 else None
        self.asked = text if len(asked) > 1 else next(iter(asked), None)
        if self.quantization_config.attention is None:
            for _, part in parts_of(config):
                if part._attn_implementation == NAME:  # the name in config.json only keeps unaware processes away
                    part._attn_implementation = None
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        plan = self.quantization_config
        self.model = model
        check_places(plan, kwargs.get("device_map"))
        self._before_loading(model, **kwargs)
        stored = _stored(kwargs.get("checkpoint_files")) if self.pre_quantized else None
        if self.pre_quantized:
            self.expected = build_forms(model, plan)
            forbid(model, plan, on=True)
        else:
            planned_blocks(model, plan)  # raises before the weights are read
            if needing := next((form for form in plan.every_form if form.calibrated), None):
                raise ValueError(
                    f"{needing!r} is made from data: load the dense model, and use hf_tfast.convert(model, plan, "
                    "calibration=batches)"
                )
        overruled = self.pre_quantized and self.asked is not None and plan.attention is not None
        dense = self.asked if self.asked in ("sdpa", "eager") or not overruled else "sdpa"
        self.implementation = stamp_model(model, plan, dense=dense or "sdpa", active=not overruled)
        if self.pre_quantized:
            self.basis = expect_basis(model, stored)
        if overruled:
            logger.warning(
                f"attn_implementation={self.asked!r} was asked for and overrules the checkpoint's plan in this "
                "process; the saved plan stays as it is"
            )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._check_shardable()
        self.model = None
        forbid(model, self.quantization_config, on=False)
        self._after_loading(model, **kwargs)
        check_loaded(model, self.basis)
        described = all(parameter.is_meta for parameter in model.parameters())  # built without weights, for a card
        if not described:
            check_filled(model, self.expected)
        if self.pre_quantized and not described:
            finish_forms(model, planned_blocks(model, self.quantization_config))
        if not self.pre_quantized:
            self.sizes, _ = make_forms(model, self.quantization_config)
        self.quantization_config = saved(self.quantization_config, self.sizes)
        attach(model, self, self.implementation)
        if (getattr(model, "tp_size", None) or 1) > 1:
            manager: Any = model._mesh_manager
            for module, stamp in stamped_modules(model):
                set_stamp(module, replace(stamp, rank=manager.get_mesh("tp").get_local_rank()))
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        if self.pre_quantized:
            cut_factors(model, self.quantization_config, plan)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Asked for every tensor of a converted checkpoint, when the model has been sharded and has no weights yet."""
        self._check_shardable()
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """As `get_new_dtype`, of a dense checkpoint."""
        self._check_shardable()
        return super().param_needs_quantization(model, param_name, **kwargs)

    def _check_shardable(self) -> None:
        if self.model is not None:
            check_shardable(self.model, self.quantization_config, converting=not self.pre_quantized)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
        """Asked at the beginning of save_pretrained, before a file is written."""
        if without := lacking(model):
            raise ValueError(
                f"{without[0]} is causal and has no calibrated basis, so the saved model could not run: call "
                "hf_tfast.calibrate(model, batches) first (or remove_plan(model), for a dense checkpoint)"
            )
        return super().get_state_dict_and_metadata(model)

    def is_serializable(self, **kwargs: Any) -> bool:
        return self.inner is None or bool(self.inner.is_serializable())

    @property
    def is_trainable(self) -> bool:
        return self.inner is None or bool(self.inner.is_trainable)

    @property
    def is_qat_trainable(self) -> bool:
        return self.inner is None or bool(self.inner.is_qat_trainable)

    @property
    def is_compileable(self) -> bool:
        return self.inner is None or bool(self.inner.is_compileable)


def _stored(files: Any) -> list[str] | None:
    """The names of the tensors in a checkpoint's files; None where they cannot be read without loading them."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def register_plan() -> None:
    """Add the quantisation method `tfast` to Transformers' tables."""
    register_quantization_config("tfast")(FastPlan)
    register_quantizer("tfast")(FastQuantizer)
