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
from .runtimes import onnxruntime, openvino
from .whole_models import ENCODERS, NOTHING, encoder, llama
from .workload import Case, Competitor

CAUSAL, ENCODING = Window(window=256), Window(window=128, sinks=1)


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    if case.causal:
        return [
            one("Llama-like, SDPA", partial(llama)),
            one("Llama-like, Window", partial(llama, fast=CAUSAL), CAUSAL),
            one(f"Llama-like, {FLOOR}", partial(llama, attention=NOTHING)),
            one(f"Llama-like, {ALONE}", partial(alone, fast=CAUSAL)),
        ]
    found = []
    for shape in ENCODERS:
        fast = partial(encoder, shape=shape, fast=ENCODING)
        found += [
            one(f"{shape}, SDPA", partial(encoder, shape=shape)),
            one(f"{shape}, Window", fast, ENCODING),
            one(f"{shape}, Window and Int8", partial(fast, form=Int8()), ENCODING),
            one(f"{shape}, OpenVINO", partial(openvino, shape=shape)),
            one(f"{shape}, OpenVINO int8", partial(openvino, shape=shape, int8=True)),
            one(f"{shape}, ONNX Runtime", partial(onnxruntime, shape=shape)),
            one(f"{shape}, {FLOOR}", partial(encoder, shape=shape, attention=NOTHING)),
            one(f"{shape}, {ALONE}", partial(alone, fast=ENCODING, shape=shape)),
        ]
    return found


def one(name: str, build: partial, mechanism: Window | None = None) -> Competitor:
    """A competitor whose series is its name: a model, a comma, and how it runs."""
    return Competitor(name, mechanism, series=name, build=build)


def prepare(case: Case, records: Sequence[Record], report: Report) -> list[Record]:
    return []


SUITE = Suite("models", (True, False), competitors, prepare, markdown, draw, level="model", patience=8.0)
