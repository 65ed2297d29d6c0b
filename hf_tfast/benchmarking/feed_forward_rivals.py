"""Who runs in the suite `feed_forward`: one feed-forward in many forms, the same weights and the same rows.

fp32, bf16           torch's own linear layers; rows are cast beforehand
bitsandbytes         stock Linear8bitLt modules in eval, threshold 6
torch dynamic int8   torch.ao.quantization.quantize_dynamic, on the engine that is named
OpenVINO int8        nncf.quantize on 300 of the rows, compiled for latency on as many threads as torch has
ours                 the forms of this package, as a plan applies them
"""

import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..feed_forward._base import Block, Form
from ..feed_forward.int8 import Int8
from ..feed_forward.low_rank import LowRank
from ..feed_forward.pruned import Pruned
from ..feed_forward.tensor_train import TensorTrain
from .workload import CannotRun, label

BASELINE = "fp32"
FLOOR = "integer products alone"
SEEN = 300  # rows that a calibrated rival sees
ENGINE = "onednn"  # torch's fastest for this on the processors that the integer product is fast on


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, activation: str, gated: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner) if gated else None
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        h = self.act_fn(self.up(x)) if self.gate is None else self.act_fn(self.gate(x)) * self.up(x)
        return self.down(h)

    @property
    def layers(self) -> tuple[str, ...]:
        return ("up", "down") if self.gate is None else ("gate", "up", "down")


@dataclass(frozen=True)
class Built:
    """call: rows [n hidden] as `ready` made them -> [n hidden]. bytes: of weights, scales and biases; None: it holds
    none of its own. exact: does it compute the feed-forward, so that its error says something?"""

    call: Callable[[Any], Any]
    bytes: int | None
    ready: Callable[[Tensor], Any] = lambda x: x  # noqa: E731
    exact: bool = True


@dataclass(frozen=True)
class Rival:
    """`build` of the dense feed-forward and some rows; CannotRun where it does not run here."""

    name: str
    build: Callable[[FeedForward, Tensor], Built]
    ours: bool = False


def rivals() -> list[Rival]:
    forms = (Int8(), LowRank(ratio=0.5), Pruned(ratio=0.5), TensorTrain(ratio=0.5))
    return [
        Rival(BASELINE, _dense),
        Rival("bf16", _bf16),
        Rival("bitsandbytes", _bitsandbytes),
        Rival("torch dynamic int8", _dynamic),
        Rival("OpenVINO int8", _openvino),
        Rival(FLOOR, _floor),
        *(Rival(label(form), partial(_ours, form), ours=True) for form in forms),  # type: ignore[arg-type]
    ]


def weight_bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.state_dict().values() if isinstance(x, Tensor))


def _dense(dense: FeedForward, x: Tensor) -> Built:
    return Built(dense, weight_bytes(dense))


def _bf16(dense: FeedForward, x: Tensor) -> Built:
    module = deepcopy(dense).to(torch.bfloat16)
    return Built(module, weight_bytes(module), ready=lambda x: x.to(torch.bfloat16))


def _ours(form: Form, dense: FeedForward, x: Tensor) -> Built:
    module = deepcopy(dense)
    *ups, down = module.layers
    block = Block(model=module, stack="", layer=0, ups=tuple(ups), down=down)
    if isinstance(form, Int8):
        if find_spec("bitsandbytes") is None:
            raise CannotRun("bitsandbytes is not installed")
        from ..backends.int8 import way_of

        if way_of("cpu") == "bf16":
            raise CannotRun("no fast integer product or no compiler here: Int8 multiplies in bf16")
    form.apply(block)
    form.finish(block)
    return Built(module.eval(), weight_bytes(module))


def _bitsandbytes(dense: FeedForward, x: Tensor) -> Built:
    try:
        from bitsandbytes.nn import Linear8bitLt
    except ImportError:
        raise CannotRun("bitsandbytes is not installed") from None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of each call: that rows are cast to fp16
    module = deepcopy(dense)
    for name in module.layers:
        layer = getattr(module, name)
        stock = Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0)
        stock.load_state_dict(layer.state_dict())
        setattr(module, name, stock)
    module = module.to("cpu").eval()  # which is where it quantises
    return Built(module, weight_bytes(module))


def _dynamic(dense: FeedForward, x: Tensor) -> Built:
    quantization: Any = getattr(torch.ao, "quantization", None)
    if not hasattr(quantization, "quantize_dynamic"):
        raise CannotRun(f"torch {torch.__version__} has no quantize_dynamic")
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise CannotRun(f"this torch has no quantised engine {ENGINE}")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will go away
            module: Any = quantization.quantize_dynamic(deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
            module(x[:1])
    finally:
        torch.backends.quantized.engine = before
    sizes = 0
    for name in dense.layers:
        weight, bias = getattr(module, name)._packed_params._weight_bias()
        sizes += weight.numel() + (0 if bias is None else bias.numel() * bias.element_size())
    return Built(module, sizes)


def _openvino(dense: FeedForward, x: Tensor) -> Built:
    missing = [name for name in ("openvino", "nncf") if find_spec(name) is None]
    if missing:
        raise CannotRun(f"not installed: {', '.join(missing)}")
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ov.convert_model(dense, example_input=x[:2], input=[-1, x.shape[1]])
        seen = nncf.Dataset([row[None].numpy() for row in x[:SEEN]])
        model = nncf.quantize(model, seen, subset_size=min(SEEN, len(x)), model_type=nncf.ModelType.TRANSFORMER)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    sizes = sum(op.data.nbytes for op in model.get_ops() if op.get_type_name() == "Constant")

    def call(rows: Any) -> Tensor:
        return torch.from_numpy(request.infer([rows], share_inputs=True, share_outputs=True)[0])

    return Built(call, sizes, ready=lambda x: x.numpy())


def _floor(dense: FeedForward, x: Tensor) -> Built:
    """What no way of calling the same integer product can be under: the products themselves, of codes at hand."""
    from ..backends.int8 import way_of

    if way_of("cpu") == "bf16":
        raise CannotRun("no fast integer product or no compiler here")
    layers = [getattr(dense, name) for name in dense.layers]
    codes = [torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8) for layer in layers]

    def ready(x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        sizes = [(len(x), *weight.shape) for weight in codes]
        return [
            (torch.randint(-127, 128, (n, i), dtype=torch.int8), weight.t(), torch.empty(n, o, dtype=torch.int32))
            for weight, (n, o, i) in zip(codes, sizes, strict=True)
        ]

    def call(products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for rows, weight, out in products:
            torch._int_mm(rows, weight, out=out)

    return Built(call, None, ready, exact=False)
