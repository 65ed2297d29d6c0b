"""Whole encoders in other runtimes, as competitors: OpenVINO and ONNX Runtime, dense, or with a plan as exported."""

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from ..attention import Mechanism
from .whole_models import document, made, only_encoders
from .workload import CannotRun, Case, Inputs

__all__ = ["onnxruntime", "openvino"]

Built = tuple[Callable[[], Any], tuple[Tensor, ...]]


def openvino(case: Case, inputs: Inputs, *, shape: str, int8: bool = False, fast: Mechanism | None = None) -> Built:
    """The encoder compiled by OpenVINO for this processor: in the precision of the case, or quantised to int8 by the
    post-training quantisation of NNCF for transformers. CannotRun where OpenVINO (or NNCF) is not installed."""
    only_encoders(case)
    _installed("openvino", *(("nncf",) if int8 else ()))
    if case.device != "cpu" or case.dtype not in ("fp32", "bf16"):
        raise CannotRun(f"not measured on {case.device} in {case.dtype}")
    request = _openvino(shape, case.dtype, case.length, int8, fast)
    ids = document(case, BertConfig().vocab_size).numpy()
    return (lambda: request.infer({0: ids})), ()


@cache
def _openvino(shape: str, dtype: str, length: int, int8: bool, fast: Mechanism | None) -> Any:
    import openvino

    states, example = _states(shape, length, fast)
    with redirect_stdout(StringIO()):
        if fast is None:
            model = openvino.convert_model(states, example_input=example, input=[example.shape])
        else:
            model = openvino.convert_model(_program(states, example))
        if int8:
            import nncf

            random = torch.Generator().manual_seed(0)
            few = [torch.randint(1000, 30000, (1, length), generator=random).numpy() for _ in range(4)]
            model = nncf.quantize(model, nncf.Dataset(few), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    hint = {"fp32": "f32", "bf16": "bf16"}[dtype]
    threads = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.compile_model(model, "CPU", {**threads, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()


def onnxruntime(case: Case, inputs: Inputs, *, shape: str, fast: Mechanism | None = None) -> Built:
    """The encoder in ONNX Runtime on its CPU provider, which computes in fp32, as torch.onnx.export writes it.
    CannotRun where onnx, onnxscript or onnxruntime is not installed, and in other precisions."""
    only_encoders(case)
    _installed("onnx", "onnxscript", "onnxruntime")
    if case.device != "cpu" or case.dtype != "fp32":
        raise CannotRun(f"not measured on {case.device} in {case.dtype}: its CPU provider computes in fp32")
    session = _onnxruntime(shape, case.length, fast)
    ids = {session.get_inputs()[0].name: document(case, BertConfig().vocab_size).numpy()}
    return (lambda: session.run(None, ids)[0]), ()


@cache
def _onnxruntime(shape: str, length: int, fast: Mechanism | None) -> Any:
    runtime: Any = import_module("onnxruntime")
    program = _program(*_states(shape, length, fast))
    with redirect_stdout(StringIO()):
        written: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        written.save(path)
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _States(nn.Module):
    """A model that gives its last hidden states alone, as a tracer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def _states(shape: str, length: int, fast: Mechanism | None) -> tuple[_States, Tensor]:
    """The encoder in fp32, and what it is recorded with."""
    return _States(made(shape, "fp32", "cpu", length, fast)), torch.zeros(1, length, dtype=torch.int64)


def _program(states: _States, example: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(states, (example,))


def _installed(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            raise CannotRun(f"{name} is not installed")
