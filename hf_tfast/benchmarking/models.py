"""The suite `models`: whole models as users run them, dense, with a plan, and what they would take instead.

Llama-like, causal        SDPA; Window(window=256); attention left out, the floor of what attention can save; the
                          window's attention alone, of all layers: with the floor, what the model should take
MiniLM, BERT base         SDPA; Window(window=128); the same with Int8 feed-forwards; OpenVINO,
                          dense, and in int8; ONNX Runtime, dense; attention left out, and alone
"""

from collections.abc import Sequence
from functools import partial

from ..attention.window import Window
from ..feed_forward.int8 import Int8
from .attention_alone import alone
from .campaign import Record, Report, Suite
from .model_pages import ALONE, FLOOR, draw, markdown
from .whole_models import ENCODERS, NOTHING, encoder, llama, onnxruntime, openvino
from .workload import Case, Competitor

CAUSAL, ENCODING = Window(window=256), Window(window=128, sinks=1)


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    if case.causal:
        return [
            _one("Llama-like, SDPA", partial(llama)),
            _one("Llama-like, Window", partial(llama, fast=CAUSAL), CAUSAL),
            _one(f"Llama-like, {FLOOR}", partial(llama, attention=NOTHING)),
            _one(f"Llama-like, {ALONE}", partial(alone, fast=CAUSAL)),
        ]
    found = []
    for shape in ENCODERS:
        fast = partial(encoder, shape=shape, fast=ENCODING)
        found += [
            _one(f"{shape}, SDPA", partial(encoder, shape=shape)),
            _one(f"{shape}, Window", fast, ENCODING),
            _one(f"{shape}, Window and Int8", partial(fast, form=Int8()), ENCODING),
            _one(f"{shape}, OpenVINO", partial(openvino, shape=shape)),
            _one(f"{shape}, OpenVINO int8", partial(openvino, shape=shape, int8=True)),
            _one(f"{shape}, ONNX Runtime", partial(onnxruntime, shape=shape)),
            _one(f"{shape}, {FLOOR}", partial(encoder, shape=shape, attention=NOTHING)),
            _one(f"{shape}, {ALONE}", partial(alone, fast=ENCODING, shape=shape)),
        ]
    return found


def _one(name: str, build: partial, mechanism: Window | None = None) -> Competitor:
    return Competitor(name, mechanism, series=name, build=build)


def prepare(case: Case, records: Sequence[Record], report: Report) -> list[Record]:
    return []


SUITE = Suite("models", (True, False), competitors, prepare, markdown, draw, level="model", patience=8.0)
