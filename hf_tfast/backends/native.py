"""C that lies beside this file, compiled on first use by the machine's own compiler and kept for the next time."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPILERS = ("cc", "gcc", "clang")
# Not -ffast-math: what is not finite has to stay so.
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
PATIENCE = 120  # seconds
SWITCH = "HF_TFAST_NATIVE"
logger = logging.getLogger(__name__)


class CannotCompile(Exception):
    """There is no library; the message says why."""


class Rows(ctypes.Structure):
    """A tensor [b h n d] as band_packing.h has it, with the numbers of a row side by side."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("b", "h", "row"))]

    @staticmethod
    def of(x: Tensor) -> "Rows":
        return Rows(x.data_ptr(), *x.stride()[:3])


def as_rows(*tensors: Tensor) -> list[Tensor]:
    """With the numbers of a row side by side, and as they are, not to be negated first, as C reads them."""
    tensors = tuple(x.resolve_neg() for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def room_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Not filled, [b h n d] as x, numbers of a row side by side: in `empty_like` not where rows of x overlap."""
    y = torch.empty_like(x, dtype=dtype)
    if y.stride(-1) == 1:
        return y
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d, dtype=dtype).transpose(1, 2)


def wanted(*tensors: Tensor) -> bool:
    """Are these plain tensors on a CPU, in a program that runs now, and is the C not switched off?"""
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)
    plain = plain and all(x.layout is torch.strided and not x.is_neg() for x in tensors)
    return plain and not torch.compiler.is_compiling() and os.environ.get(SWITCH, "1") != "0"


def on_vectors(name: str, symbols: Sequence[str], call: type[ctypes.Structure], what: str) -> list[Any] | None:
    """Functions of `name`.c that take a pointer to `call` and give 0, for CPUs with AVX2 or more. None where there is
    no C: a warning says that `what` is slower."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        if not capability.startswith(("AVX", "AMX")):
            raise CannotCompile(f"this CPU has no wide vectors ({capability})")
        library = load(name)
    except CannotCompile as error:
        logger.warning("%s runs on torch's own operations, which is slower: %s", what, error)
        return None
    found = [getattr(library, symbol) for symbol in symbols]
    for function in found:
        function.argtypes, function.restype = [ctypes.POINTER(call)], ctypes.c_int
    return found


def compiler() -> str | None:
    """The path of a C compiler, None where there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@cache
def load(name: str) -> ctypes.CDLL:
    """The library of `name`.c. CannotCompile names what is missing, or what the compiler said."""
    # Not by __file__: code that a model carries as one generated file has no C beside it, and then runs without.
    program, source = compiler(), Path(compiler.__code__.co_filename).with_name(f"{name}.c")
    if not source.is_file():
        raise CannotCompile(f"{source.name} does not lie beside the code that asks for it")
    if program is None:
        raise CannotCompile(f"there is no C compiler ({', '.join(COMPILERS)})")
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    about = "\n".join([*texts, program, *FLAGS, platform.platform(), _processor()])
    path = _folder() / f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        logger.info("compiling %s, once on this machine: a few seconds", source.name)
        _compile(program, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotCompile(f"{path} cannot be loaded: {error}") from error


def _compile(program: str, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as working:
        made = Path(working) / path.name
        command = [program, *FLAGS, str(source), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotCompile(f"{program} does not run: {error}") from error
        if done.returncode:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
            raise CannotCompile(f"{program} cannot compile {source.name}: {said[:200]}")
        os.replace(made, path)  # another process may be at it too; either file is whole


@cache
def _folder() -> Path:
    """The user's own cache, or where that cannot be written a folder that is new in each process: a library is not
    loaded from where others can write."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "hf_tfast"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="hf_tfast-"))


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by machines."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())
