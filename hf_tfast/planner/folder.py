"""A plan for a model in a folder or on the Hub, from text: what `tfast plan` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ..benchmarking.environment import environment
from ..benchmarking.folder import check_new, fresh_name, new_folder
from ..compression._batches import Batch
from ..compression.folder import DTYPES, model_class
from ..positions import extend_positions
from .propose import Proposal, propose_plan
from .report import MARK, write

__all__ = ["Request", "plan_folder"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """model     Hub id or folder of a dense model; `name` of it in the report.
    texts        documents; those of `length` tokens or more are read, cut to it; shorter ones are joined.
    length       tokens of a row; learned positions are extended to it.
    max_error    budget of the end error, see `propose_plan`.
    rows         of text: a third for layers, for the choice and for the last check each.
    seconds      about what the measurements may take, see `propose_plan`.
    out          folder to make; None: a new one in runs/.
    """

    model: str
    name: str
    texts: Sequence[str]
    corpus: str
    length: int = 4096
    max_error: float = 0.01
    rows: int = 6
    mechanisms: Sequence[str] | None = None
    device: str = "cpu"
    dtype: str = "auto"
    rounds: int = 5
    training: bool = False
    seconds: float | None = None
    out: Path | None = None
    overwrite: bool = False
    plots: bool = True


def plan_folder(request: Request, report: Callable[[str], None] = lambda text: None) -> tuple[Path, Proposal]:
    """Load, measure and write the report; returns its folder and the proposal.

    FileExistsError where `out` exists; ValueError for what cannot be used, before the weights are read where possible.
    """
    target = request.out or fresh_name("plan")
    check_new(target, request.overwrite, MARK)
    _check(request)
    config = AutoConfig.from_pretrained(request.model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{request.model} has a plan or is quantised: give the dense model that it was made from")
    batches = rows_of(request, config)
    report(f"loading {request.name}")
    model = model_class(config).from_pretrained(request.model, dtype=DTYPES[request.dtype]).to(request.device)
    native = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(native, int) and 0 < native < request.length:
        extend_positions(model, request.length)
    batches = [{name: x.to(request.device) for name, x in batch.items()} for batch in batches]
    about = {
        "kind": "plan", "model": request.name, "corpus": request.corpus, "length": request.length,
        "batches": len(batches), "rounds": request.rounds, "training": request.training, "device": request.device,
        "dtype": str(model.dtype).removeprefix("torch."), "environment": environment(),
    }  # fmt: skip
    found = propose_plan(
        model, batches, max_error=request.max_error, mechanisms=request.mechanisms, rounds=request.rounds,
        training=request.training, seconds=request.seconds, report=report,
    )  # fmt: skip
    with new_folder(target, overwrite=request.overwrite, mark=MARK) as folder:
        write(found, folder, about, request.plots)
    return target, found


def _check(request: Request) -> None:
    if request.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    if request.length < 128:
        raise ValueError(f"length must be at least 128, got {request.length}: shorter inputs are fastest densely")
    if request.rows < 3:
        raise ValueError(f"rows must be at least 3, got {request.rows}")
    if torch.device(request.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, and this torch finds no CUDA device; use --device cpu")


def rows_of(request: Request, config: PreTrainedConfig) -> list[Batch]:
    """Batches of one row of `length` tokens each. ValueError where the texts have too few of them."""
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    cut = {"truncation": True, "max_length": request.length, "return_tensors": "pt"}
    rows, joined = [], ""
    for text in request.texts:
        joined = f"{joined}\n\n{text}" if joined else text
        ids = tokenizer(joined, **cut)["input_ids"]
        if ids.shape[1] == request.length:
            rows.append(ids)
            joined = ""
        if len(rows) == request.rows:
            break
    if len(rows) < 3:
        raise ValueError(
            f"{request.corpus} makes {len(rows)} rows of {request.length} tokens, three at least are needed: give "
            "more text with --corpus, or a shorter --length"
        )
    decoder = config.is_encoder_decoder
    return [{"input_ids": ids, **({"decoder_input_ids": ids} if decoder else {})} for ids in rows]
