"""Whole models as competitors: built from a config with random weights, which time does not depend on.

Llama-like   causal, 4 layers, 512 wide, 8 query on 4 key/value heads, vocabulary 8192. forward: prefill, logits of the
             last token only. both: a training step without its optimiser, next-token loss of every token.
MiniLM       the shape of all-MiniLM-L6-v2: 6 layers, 384 wide, 12 heads. BERT base: 12 layers, 768 wide, 12 heads.
             forward only: last hidden states of one document.
"""

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
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..attention import Mechanism
from ..feed_forward import Form
from ..feed_forward.int8 import Int8
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from .workload import DTYPES, CannotRun, Case, Inputs

__all__ = ["encoder", "llama", "onnxruntime", "openvino"]

Built = tuple[Callable[[], Tensor], tuple[Tensor, ...]]
NOTHING = "tfast_bench_nothing"
VOCABULARY = 8192
LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LONGEST = 8192  # tokens of an encoder's document: dense ones take minutes beyond
ENCODERS: dict[str, dict[str, Any]] = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


def llama(case: Case, inputs: Inputs, *, fast: Mechanism | None = None, attention: str = "sdpa") -> Built:
    """`attention`: "sdpa", or NOTHING, which leaves attention out: values pass as they are."""
    if attention == NOTHING:
        _register_nothing()
    model = _llama(case.dtype, case.device, max(case.length, 16384), attention, fast)
    model.train(case.passes == "both")
    ids = _ids(case, VOCABULARY)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def prefill() -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return (loss, tuple(model.parameters())) if case.passes == "both" else (prefill, ())


@cache
def _llama(dtype: str, device: str, positions: int, attention: str, fast: Mechanism | None) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=1536, max_position_embeddings=positions, **LLAMA)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=DTYPES[dtype]).to(device)
    return model if fast is None else apply_plan(model, FastPlan(attention=fast))


def encoder(
    case: Case, inputs: Inputs, *, shape: str, fast: Mechanism | None = None, form: Form | None = None,
    attention: str = "sdpa",
) -> Built:  # fmt: skip
    """One document through an encoder; `attention` as in `llama`. CannotRun for training passes and for documents
    longer than LONGEST."""
    _encoders(case)
    if attention == NOTHING:
        _register_nothing()
    model = _encoder(shape, case.dtype, case.device, case.length, fast, form, attention)
    ids = _ids(case, model.config.vocab_size)
    return (lambda: model(input_ids=ids).last_hidden_state), ()


@cache
def _encoder(
    shape: str, dtype: str, device: str, positions: int, fast: Mechanism | None = None, form: Form | None = None,
    attention: str = "sdpa",
) -> Any:  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=positions, **ENCODERS[shape])
    model = BertModel._from_config(config, attn_implementation=attention, dtype=DTYPES[dtype]).to(device).eval()
    if isinstance(form, Int8) and find_spec("bitsandbytes") is None:
        raise CannotRun("bitsandbytes is not installed")
    return model if fast is None else apply_plan(model, FastPlan(attention=fast, feed_forward=form))


def openvino(case: Case, inputs: Inputs, *, shape: str, int8: bool = False) -> Built:
    """The dense encoder compiled by OpenVINO for this processor: in the precision of the case, or quantised to int8 by
    NNCF's post-training quantisation for transformers. CannotRun where OpenVINO (or NNCF) is not installed."""
    _encoders(case)
    _installed("openvino", *(("nncf",) if int8 else ()))
    if case.device != "cpu" or case.dtype not in ("fp32", "bf16"):
        raise CannotRun(f"not measured on {case.device} in {case.dtype}")
    request = _openvino(shape, case.dtype, case.length, int8)
    ids = _ids(case, BertConfig().vocab_size).numpy()
    return (lambda: request.infer({0: ids})), ()


@cache
def _openvino(shape: str, dtype: str, length: int, int8: bool) -> Any:
    import openvino

    dense = _encoder(shape, "fp32", "cpu", length)
    example = torch.zeros(1, length, dtype=torch.int64)
    with redirect_stdout(StringIO()):
        model = openvino.convert_model(_States(dense), example_input=example, input=[example.shape])
        if int8:
            import nncf

            random = torch.Generator().manual_seed(0)
            few = [torch.randint(1000, 30000, (1, length), generator=random).numpy() for _ in range(4)]
            model = nncf.quantize(model, nncf.Dataset(few), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    hint = {"fp32": "f32", "bf16": "bf16"}[dtype]
    threads = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return openvino.compile_model(model, "CPU", {**threads, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()


def onnxruntime(case: Case, inputs: Inputs, *, shape: str) -> Built:
    """The dense encoder in ONNX Runtime on its CPU provider, which computes in fp32, as torch.onnx.export writes it.
    CannotRun where onnx, onnxscript or onnxruntime is not installed, and in other precisions."""
    _encoders(case)
    _installed("onnx", "onnxscript", "onnxruntime")
    if case.device != "cpu" or case.dtype != "fp32":
        raise CannotRun(f"not measured on {case.device} in {case.dtype}: its CPU provider computes in fp32")
    session = _onnxruntime(shape, case.length)
    ids = {session.get_inputs()[0].name: _ids(case, BertConfig().vocab_size).numpy()}
    return (lambda: session.run(None, ids)[0]), ()


@cache
def _onnxruntime(shape: str, length: int) -> Any:
    runtime: Any = import_module("onnxruntime")
    dense, example = _States(_encoder(shape, "fp32", "cpu", length)), torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad(), redirect_stdout(StringIO()):
        program: Any = torch.onnx.export(dense, (example,), dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        program.save(path)
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _installed(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            raise CannotRun(f"{name} is not installed")


class _States(nn.Module):
    """A model that gives its last hidden states alone, as a tracer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def _encoders(case: Case) -> None:
    if case.passes != "forward":
        raise CannotRun("encoders are measured forward")
    if case.length > LONGEST:
        raise CannotRun(f"encoders are measured up to {LONGEST} tokens")


def _ids(case: Case, vocabulary: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (case.batch, case.length), generator=random).to(case.device)


def _register_nothing() -> None:
    if NOTHING not in AttentionInterface._global_mapping:
        AttentionInterface.register(NOTHING, _nothing)
        AttentionMaskInterface.register(NOTHING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _nothing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Every query takes its own value; gradients of zero still reach the projections of queries and keys."""
    h, g = query.shape[1], value.shape[1]
    o = value.repeat_interleave(h // g, 1)
    if torch.is_grad_enabled():
        o = o + 0 * (query.sum() + key.sum())
    return o.transpose(1, 2).contiguous(), None
