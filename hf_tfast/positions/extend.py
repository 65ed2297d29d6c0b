"""Positions: makes a pretrained model take longer inputs than it was trained with.

Learned tables grow (BERT, RoBERTa, DistilBERT, ELECTRA, GPT-2, GPT-Neo, OPT, BART, Whisper's decoder, CLIP's text
half), sinusoidal tables are computed further (Marian, Pegasus, M2M100, DistilBERT's, Whisper's encoder), rotary models
get the right config. Models that count distances (T5, ALiBi) need nothing and say so; the rest is refused by name.

Source   tiling: Beltagy et al., "Longformer", section 5, https://arxiv.org/abs/2004.05150; rotary interpolation: Peng
         et al., "YaRN", section 3.2-3.4, https://arxiv.org/abs/2309.00071
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention._base import whole

METHODS = ("tile", "interpolate")

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_DISTANCES = ("rel_embeddings", "distance_embedding")  # relative tables whose size is tied to the length
_COPIES = {  # a config field, and the plain attributes that modules keep of it
    "max_position_embeddings": (
        "max_position_embeddings",
        "max_source_positions",
        "max_target_positions",
        "max_positions",
    ),
    "n_positions": ("max_position_embeddings", "n_positions"),
    "max_source_positions": ("max_source_positions",),
    "max_target_positions": ("max_target_positions",),
    "max_encoder_position_embeddings": ("max_source_positions",),
    "max_decoder_position_embeddings": ("max_target_positions",),
}


@dataclass(frozen=True)
class _Table:
    """One table of absolute positions: `front` special rows, then one row for each of `old` positions."""

    path: str
    module: nn.Module
    parent: nn.Module
    owner: nn.Module  # the nearest model around it, whose config counts it
    configs: list[PreTrainedConfig]
    field: str
    front: int
    counted: int  # how many of the special rows the config field counts too (RoBERTa: all, OPT and BART: none)
    old: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.configs[0]


@dataclass(frozen=True)
class _Rotary:
    path: str
    module: nn.Module
    configs: list[PreTrainedConfig]


def extend_positions(model: PreTrainedModel, length: int, method: str = "tile") -> PreTrainedModel:
    """Let `model` take inputs of `length` tokens, in place; returns it. Saves and reloads with plain AutoModel.

    method      "tile": learned rows are copied one behind the other, as Longformer was made from RoBERTa: what was
                learned about neighbours holds everywhere, inputs that fitted before give the same numbers bit for bit.
                A rotary model keeps its frequencies. "interpolate": learned rows are stretched linearly over the new
                length (first and last row stay); a rotary model gets YaRN with factor length / old length, which keeps
                fast-turning pairs and stretches slow ones, and whose frequencies do not depend on the input, so that
                cached keys stay right (layers that have a window of their own keep plain rotation). Short inputs then
                change a little; train a few steps. Sinusoidal tables are a formula: recomputed by "tile" only.
    Special rows (RoBERTa's padding rows, the 2 of OPT and BART) are kept; so are dtype, device and requires_grad, and
    position_ids, token_type_ids, causal `bias` buffers and all config fields follow. Of a composite, every text stack
    is extended and images and audio stay (Whisper: `length` counts tokens; extend `model.get_encoder()` for frames).

    The grown table is a new Parameter: make the optimizer afterwards. `tokenizer.model_max_length` is the caller's to
    set. Extend a dense model first, then apply a plan.

    Raises ValueError, with the model unchanged, for a length that is not longer, and for models without extendable
    positions or with ones that are not known here.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected a Transformers model, got {type(model).__name__}; of a wrapper, give the model inside"
        )
    whole("length", length, 1)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    tables, rotaries = _tables(model), _rotaries(model)
    if not tables and not rotaries:
        raise ValueError(_why_not(model))
    for table in tables:
        _check_table(table, model, length, method)
    squares = [
        change for owner in {id(t.owner): t for t in tables}.values() for change in _causal_buffers(owner, length)
    ]
    grown: dict[int, nn.Parameter] = {}  # by the old parameter, so that tied tables stay tied
    for table in tables:
        weight = getattr(table.module, "weight", None)
        if weight is not None and id(weight) not in grown:
            new = _grown(table, length, method)
            grown[id(weight)] = nn.Parameter(new.to(weight), requires_grad=weight.requires_grad)
    _extend_rotaries(rotaries, length, method)  # the last step that can refuse
    for table in tables:
        _apply(table, length, grown)
    for module, name, buffer in squares:
        _replace_buffer(module, name, buffer)
    for config, field, value in [(c, t.field, length + t.counted) for t in tables for c in t.configs]:
        if getattr(config, "n_ctx", None) == getattr(config, field):
            config.n_ctx = value
        setattr(config, field, value)
    return model


def _text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, list[PreTrainedModel]]]:
    """(path, module, owners): owners are the models around it, the nearest first; images are left out."""
    models = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for path, module in model.named_modules():
        parts = path.split(".") if path else []
        prefixes = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        owners = [models[prefix] for prefix in prefixes if prefix in models]
        if not _is_vision(owners[0].config):
            yield path, module, owners


def _configs(path: str, owners: list[PreTrainedModel]) -> list[PreTrainedConfig]:
    """Every config object that describes the nearest owner: a head and the model in it may hold one each."""
    mine = [o.config for o in owners if type(o.config) is type(owners[0].config)]
    reached, waiting = set(), [owners[-1].config]
    while waiting:
        config = waiting.pop()
        if id(config) not in reached:
            reached.add(id(config))
            waiting += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    if not any(id(config) in reached for config in mine):
        raise ValueError(f"the config that counts {path} is not part of the config of {_name(owners[-1])}")
    return list({id(config): config for config in mine}.values())


def _is_vision(config: PreTrainedConfig) -> bool:
    return hasattr(config, "patch_size") or hasattr(config, "image_size")


def _tables(model: PreTrainedModel) -> list[_Table]:
    """Every table of absolute positions in the text stacks (audio only when there is nothing else)."""
    found, seen = [], list(_text_modules(model))
    for path, parent, owners in seen:
        for name in _TABLES:
            module = parent._modules.get(name)
            if module is not None:
                found.append(_table(f"{path}.{name}".lstrip("."), module, parent, owners))
    for path, module, _ in seen:
        if found and path.split(".")[-1] in _DISTANCES:
            raise ValueError(
                f"{_name(model)} ties its table of distances {path} ({type(module).__name__}) to its length; "
                "it cannot be extended"
            )
    text = [t for t in found if not (t.field == "max_source_positions" and hasattr(t.config, "num_mel_bins"))]
    return text or found


def _table(path: str, module: nn.Module, parent: nn.Module, owners: list[PreTrainedModel]) -> _Table:
    owner, config = owners[0], owners[0].config
    unknown = f"does not know how to extend {path} ({type(module).__name__}) of {_name(owner)}"
    if hasattr(module, "make_weights") and isinstance(getattr(module, "weights", None), Tensor):
        rows, front, counted = None, int(getattr(module, "offset", 0)), 0  # a sinusoidal table that grows by itself
    elif isinstance(module, nn.Embedding):
        rows = module.num_embeddings
        offset = int(getattr(module, "offset", 0))
        padded = 0 if module.padding_idx is None else module.padding_idx + 1
        front, counted = (offset, 0) if offset else (padded, padded)
    else:
        raise ValueError(f"extend_positions {unknown}")
    second = "decoder" in type(owner).__name__.lower()
    first = ("max_target_positions", "max_decoder_position_embeddings")
    last = ("max_source_positions", "max_encoder_position_embeddings")
    for field in ("max_position_embeddings", "n_positions", *(first if second else last)):
        size = getattr(config, field, None)
        field = config.attribute_map.get(field, field)
        if isinstance(size, int) and (rows is None or rows == size - counted + front):
            configs = _configs(path, owners)
            return _Table(path, module, parent, owner, configs, field, front, counted, size - counted)
    raise ValueError(f"extend_positions {unknown}: its {rows} rows fit no field of the config")


def _check_table(table: _Table, model: PreTrainedModel, length: int, method: str) -> None:
    where = f"{table.path} of {_name(model)}"
    if length <= table.old:
        raise ValueError(f"{where} takes {table.old} positions already; expected a length above that, got {length}")
    shared = table.field in ("max_position_embeddings", "n_positions") or type(model).__name__.endswith("Decoder")
    if table.owner is model and shared and getattr(table.config, "is_encoder_decoder", False) and _is_half(model):
        raise ValueError(f"{_name(model)} shares its config with the rest of its model: extend the whole model")
    weight = getattr(table.module, "weight", None)
    if weight is not None and (weight.is_meta or type(weight.data) is not Tensor):
        raise ValueError(
            f"{where} is sharded, offloaded or on meta: extend the model in one process, save it, then load it sharded"
        )
    if method == "interpolate" and (weight is None or _formula(table) is not None):
        raise ValueError(f'{where} is a sinusoid: method="tile" computes it further, there is nothing to interpolate')


def _is_half(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(("Encoder", "Decoder", "Stack"))


def _grown(table: _Table, length: int, method: str) -> Tensor:
    """[front + length, d]: the new rows of a table."""
    weight: Tensor = table.module.get_parameter("weight").detach()
    front, body = weight[: table.front], weight[table.front :]
    formula = _formula(table)
    if formula is not None:
        return torch.cat([weight, formula(table.front + length, weight.shape[1]).to(weight)[len(weight) :]])
    if method == "tile":
        return torch.cat([front, body.repeat(math.ceil(length / len(body)), 1)[:length]])
    at = torch.linspace(0, len(body) - 1, length, dtype=torch.float64, device=weight.device)
    low = at.floor().long().clamp_(max=len(body) - 1)
    high = (low + 1).clamp_(max=len(body) - 1)
    share = (at - low)[:, None].to(torch.promote_types(weight.dtype, torch.float32))
    return torch.cat([front, (body[low] * (1 - share) + body[high] * share).to(weight.dtype)])


def _formula(table: _Table) -> Callable[[int, int], Tensor] | None:
    """(rows, width) -> the sinusoidal table of this kind of model; None for a learned table."""
    if hasattr(table.module, "create_weight"):  # Marian, Pegasus
        kind: Any = type(table.module)
        return lambda rows, width: kind(rows, width).create_weight()
    if getattr(table.config, "sinusoidal_pos_embds", False):  # DistilBERT, which may train it
        return _unless_trained(table, _interleaved)
    if table.field == "max_source_positions" and hasattr(table.config, "num_mel_bins"):  # Whisper's encoder
        return _unless_trained(table, _halves)
    return None


def _unless_trained(table: _Table, formula: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor] | None:
    weight = table.module.get_parameter("weight").detach()
    slack = 4 * torch.finfo(weight.dtype).eps + 4e-7 * len(weight)  # Transformers computes some in fp32
    return formula if torch.allclose(formula(*weight.shape).to(weight).float(), weight.float(), atol=slack) else None


def _interleaved(rows: int, width: int) -> Tensor:
    return torch.stack(_waves(rows, [n / width for n in range(0, width, 2)]), -1).flatten(1)


def _halves(rows: int, width: int) -> Tensor:
    return torch.cat(_waves(rows, [n / (width // 2 - 1) for n in range(width // 2)]), 1)


def _waves(rows: int, exponents: list[float]) -> tuple[Tensor, Tensor]:
    """sin and cos of position / 10000^exponent, [rows, exponents] each, float64."""
    turns = 10000.0 ** -torch.tensor(exponents, dtype=torch.float64)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * turns
    return angles.sin(), angles.cos()


def _causal_buffers(table: _Table, length: int) -> list[tuple[nn.Module, str, Tensor]]:
    """The larger causal masks of attention modules that keep one: [.., n, n], lower triangle, or a band of it."""
    changes, n = [], table.old
    for path, module in table.owner.named_modules():
        local = getattr(module, "attention_type", "global") == "local"  # GPT-Neo
        for name, buffer in module.named_buffers(recurse=False):
            if name not in ("bias", "causal_mask") or tuple(buffer.shape[-2:]) != (n, n):
                continue
            band = int(table.config.window_size) if local else length
            if not bool((buffer == _triangle(n, band, buffer)).all()):
                raise ValueError(f"extend_positions does not know the mask kept in {path}.{name}: it is not causal")
            changes.append((module, name, _triangle(length, band, buffer)))
    return changes


def _triangle(n: int, band: int, like: Tensor) -> Tensor:
    ones = torch.ones(n, n, dtype=torch.bool, device=like.device)
    return (ones.tril() & ~ones.tril(-band)).to(like.dtype).expand(*like.shape[:-2], n, n).clone()


def _apply(table: _Table, length: int, grown: dict[int, nn.Parameter]) -> None:
    module: Any = table.module
    if hasattr(module, "make_weights"):
        module.make_weights(length + table.front, module.embedding_dim, module.padding_idx)
    else:
        module.weight = grown[id(module.weight)]
        module.num_embeddings = len(module.weight)
    old, new = table.old + table.counted, length + table.counted
    for name in ("position_ids", "token_type_ids"):
        buffer = table.parent._buffers.get(name)
        if buffer is not None and buffer.shape[-1] == old:
            row = torch.arange(new, device=buffer.device) if name == "position_ids" else buffer.new_zeros(new)
            _replace_buffer(table.parent, name, row.to(buffer.dtype).expand(*buffer.shape[:-1], new).clone())
    for part in table.owner.modules():
        for name in _COPIES[table.field]:
            if vars(part).get(name) == old:
                setattr(part, name, new)


def _replace_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    module.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)


def _rotaries(model: PreTrainedModel) -> list[_Rotary]:
    found = []
    for path, module, owners in _text_modules(model):
        if type(module).__name__.endswith("RotaryEmbedding"):
            config = getattr(module, "config", None)
            if not isinstance(config, PreTrainedConfig) or not isinstance(
                getattr(config, "rope_parameters", None), dict
            ):
                raise ValueError(f"extend_positions does not know the rotation {path} of {_name(model)}")
            same = [c for c in _configs(path, owners) if c is not config]
            found.append(_Rotary(path, module, [config, *same]))
    return found


def _extend_rotaries(rotaries: list[_Rotary], length: int, method: str) -> None:
    """Change the configs, rebuild the modules from them, check; on any error everything is as it was."""
    configs = {id(c): c for r in rotaries for c in r.configs}
    before = {key: (c.max_position_embeddings, deepcopy(c.rope_parameters)) for key, c in configs.items()}
    try:
        for config in configs.values():
            _extend_rotary_config(config, length, method)
        rebuilt = [_rebuilt(rotary) for rotary in rotaries]
        if method == "tile":
            for rotary, new in zip(rotaries, rebuilt, strict=True):
                _check_same(rotary, new)
    except Exception:
        for key, config in configs.items():
            config.max_position_embeddings, config.rope_parameters = before[key]
        raise
    for rotary, new in zip(rotaries, rebuilt, strict=True):
        plain = {k: v for k, v in vars(new).items() if not k.startswith("_") and k not in ("training", "config")}
        vars(rotary.module).update(plain)
        if method == "interpolate":
            for name, buffer in new.named_buffers(recurse=False):
                _replace_buffer(rotary.module, name, buffer.to(rotary.module.get_buffer(name).device))


def _extend_rotary_config(config: PreTrainedConfig, length: int, method: str) -> None:
    old, where = config.max_position_embeddings, f"the rotary config of {config.model_type}"
    if length <= old:
        raise ValueError(f"{where} takes {old} positions already; expected a length above that, got {length}")
    parameters = deepcopy(config.rope_parameters)
    nested = "rope_type" not in parameters  # one dict for each type of layer
    for layer_type, rope in parameters.items() if nested else [("", parameters)]:
        if rope is None:
            continue
        if rope["rope_type"] == "dynamic":
            raise ValueError(f"{where} is scaled dynamically: it follows the length of each input by itself")
        if method == "interpolate" and not any(word in layer_type for word in ("sliding", "local", "chunked")):
            if rope["rope_type"] != "default":
                raise ValueError(
                    f"{where} is scaled by {rope['rope_type']!r} already; set config.rope_parameters yourself, or use "
                    'method="tile", which keeps the frequencies'
                )
            rope.update(rope_type="yarn", factor=length / old, original_max_position_embeddings=old)
    config.max_position_embeddings = length
    config.rope_parameters = parameters
    config.validate_rope()


def _rebuilt(rotary: _Rotary) -> nn.Module:
    try:
        return type(rotary.module)(rotary.configs[0])
    except (TypeError, KeyError) as error:
        kind = type(rotary.module).__name__
        raise ValueError(f"extend_positions does not know the rotation {rotary.path} ({kind})") from error


def _check_same(rotary: _Rotary, new: nn.Module) -> None:
    """Frequencies must not depend on the declared length, or keeping them would not survive a reload."""
    for name, buffer in new.named_buffers(recurse=False):
        old = rotary.module.get_buffer(name)
        scaling = [getattr(m, name.replace("inv_freq", "attention_scaling"), 1.0) for m in (rotary.module, new)]
        if not torch.equal(buffer.to(old), old) or scaling[0] != scaling[1]:
            raise ValueError(
                f"the rotation {rotary.path} changes with max_position_embeddings, so its frequencies cannot be kept; "
                "set config.rope_parameters yourself"
            )


def _why_not(model: PreTrainedModel) -> str:
    """What to tell about a model in which nothing was found to extend."""
    names = {path.split(".")[-1] for path, _ in model.named_modules()}
    config = model.config
    if "relative_attention_bias" in names:
        return f"{_name(model)} counts distances (a relative position bias): it takes any length, nothing to extend"
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return f"{_name(model)} counts distances (ALiBi): it takes any length, nothing to extend"
    if _is_vision(config):
        return f"the positions of {_name(model)} are patches of an image; call it with interpolate_pos_encoding=True"
    return f"extend_positions found no positions that it knows in {_name(model)} ({config.model_type})"


def _name(model: nn.Module) -> str:
    return type(model).__name__
