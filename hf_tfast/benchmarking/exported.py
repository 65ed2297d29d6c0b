"""The suite `exported`: a whole encoder with a window, and dense, in torch and in the runtimes that take its program.

MiniLM's shape, one document: SDPA and Window(window=128, sinks=1) in torch; both in ONNX Runtime (fp32) and OpenVINO.
"""

from collections.abc import Sequence
from functools import partial

from .campaign import Record, Suite
from .model_pages import draw, markdown
from .models import ENCODING, one, prepare
from .runtimes import onnxruntime, openvino
from .whole_models import encoder
from .workload import Case, Competitor

SHAPE = "MiniLM"
RUNTIMES = {"ONNX Runtime": onnxruntime, "OpenVINO": openvino}


def competitors(case: Case, records: Sequence[Record]) -> list[Competitor]:
    found = [
        one(f"{SHAPE}, SDPA", partial(encoder, shape=SHAPE)),
        one(f"{SHAPE}, Window", partial(encoder, shape=SHAPE, fast=ENCODING), ENCODING),
    ]
    for name, runtime in RUNTIMES.items():
        found.append(one(f"{SHAPE}, {name}", partial(runtime, shape=SHAPE)))
        found.append(one(f"{SHAPE}, Window in {name}", partial(runtime, shape=SHAPE, fast=ENCODING), ENCODING))
    return found


SUITE = Suite(
    "exported", (False,), competitors, prepare, markdown, draw, level="model", patience=8.0, passes=("forward",)
)
