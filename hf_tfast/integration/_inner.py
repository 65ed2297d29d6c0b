"""A quantiser that leaves weights to another one of Transformers', where a plan has a `base`: what that one does to
the weights is done by it alone, hook by hook, and the plan's own quantiser adds its attention."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

__all__ = ["WithBase"]


class WithBase(HfQuantizer):
    """`inner` is the quantiser of the plan's base, None without one: then every hook is HfQuantizer's own."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        base = quantization_config.base
        self.inner: HfQuantizer | None = (
            None if base is None else AutoHfQuantizer.from_config(base, pre_quantized=self.pre_quantized)
        )

    def _one(self) -> Any:
        """Whose hooks run."""
        return super() if self.inner is None else self.inner

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        return {} if self.inner is None else self.inner.serialized_names

    @property
    def quantized_element_size(self) -> float | None:
        return None if self.inner is None else self.inner.quantized_element_size

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self._one().validate_environment(*args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._one().update_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        return self._one().update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return self._one().adjust_max_memory(max_memory)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        return self._one().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._one().param_needs_quantization(model, param_name, **kwargs)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return self._one().get_new_dtype(converter, param, dtype)

    def get_quantize_ops(self) -> Any:
        return self._one().get_quantize_ops()

    def get_load_operations(self) -> dict[str, Any]:
        return self._one().get_load_operations()

    def get_weight_conversions(self) -> list[Any]:
        return self._one().get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: Any, model: PreTrainedModel) -> Any:
        return self._one().update_weight_conversions(weight_conversions, model)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        self._one().update_parallel_plan(model, plan)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
        return self._one().get_state_dict_and_metadata(model)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        self._one()._convert_model_for_quantization(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        return self._one()._dequantize(model, dtype=dtype)

    def _before_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """The base's part of what happens before the weights are read."""
        if self.inner is not None:
            self.inner._process_model_before_weight_loading(model, **kwargs)

    def _after_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """The base's part of what happens after. A state dict has the base's tensors as they are stored: the base's
        conversions have no way back, and Transformers would look for one when saving."""
        if self.inner is None:
            return
        self.inner._process_model_after_weight_loading(model, **kwargs)
        if (done := getattr(model, "_weight_conversions", None)) is not None:
            mine = [each for each in done if not any(self._of_base(step) for step in getattr(each, "operations", ()))]
            model._weight_conversions = mine  # type: ignore[assignment]

    def _of_base(self, operation: Any) -> bool:
        return getattr(operation, "hf_quantizer", None) is self.inner
