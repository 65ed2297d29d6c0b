"""Exported plan models in other runtimes: ONNX Runtime and OpenVINO compute what torch does. Skipped without them."""

import pytest
import torch

from hf_tfast import Nystrom, Window
from hf_tfast.testing import assert_near, generator
from tests.integration.test_export import Encoder, draw, planned

MIXED = {"0": Nystrom(landmarks=8), "1": Window(window=8, sinks=1)}
pytestmark = pytest.mark.filterwarnings("ignore")  # those of exporters


def exported(attention, **options):
    program_of = Encoder(planned("bert", attention=attention))
    with torch.no_grad():
        return program_of, torch.export.export(program_of, (draw("runtimes"),), **options)


def same(run, program_of, *shapes):
    for b, n in shapes:
        tokens = torch.randint(3, 90, (b, n), generator=generator("runtimes", b, n))
        with torch.no_grad():
            assert_near(torch.from_numpy(run(tokens.numpy()).copy()), program_of(tokens), f"{b} x {n}", 1e-4)


def onnx(program, path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(None, {session.get_inputs()[0].name: tokens})[0]


def openvino(program, path):
    runtime = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = runtime.compile_model(
        runtime.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    return lambda tokens: compiled(tokens)[0]


@pytest.mark.parametrize("runtime", [onnx, pytest.param(openvino, marks=pytest.mark.slow)])
def test_fast_attention_of_one_shape(runtime, tmp_path):
    program_of, program = exported(MIXED)
    same(runtime(program, tmp_path / "fast.onnx"), program_of, (2, 100))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [onnx, openvino])
def test_open_batch_and_length(runtime, tmp_path):
    batch, length = torch.export.Dim("batch", max=9), torch.export.Dim("length", min=4, max=128)
    sizes = {"dynamic_shapes": ({0: batch, 1: length},), "prefer_deferred_runtime_asserts_over_guards": True}
    program_of, program = exported({"0": Window(window=8), "1": Window(window=20, sinks=2)}, **sizes)
    same(runtime(program, tmp_path / "open.onnx"), program_of, (1, 5), (3, 64), (2, 117))
