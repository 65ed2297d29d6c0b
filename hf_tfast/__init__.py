"""Fast attention and feed-forwards for any Hugging Face Transformer, kept through save, reload and push.

Importing adds names to Transformers' registries and changes nothing that exists. Everything below loads on first use.
"""

from importlib import import_module
from typing import Any

from .integration import register
from .models import register_models

__version__ = "0.1.0"

_HOMES = {
    "hf_tfast.attention": ("Mask", "Score", "attend", "mechanisms"),
    "hf_tfast.attention.dense": ("Dense",),
    "hf_tfast.attention.graph": ("Graph",),
    "hf_tfast.attention.quantized": ("Quantized",),
    "hf_tfast.attention.random": ("Random",),
    "hf_tfast.attention.svd": ("SVD",),
    "hf_tfast.attention.hashed": ("Hashed",),
    "hf_tfast.attention.linformer": ("Linformer",),
    "hf_tfast.attention.nystrom": ("Nystrom",),
    "hf_tfast.attention.performer": ("Performer",),
    "hf_tfast.attention.scatterbrain": ("Scatterbrain",),
    "hf_tfast.attention.threshold": ("Threshold",),
    "hf_tfast.attention.topk": ("TopK",),
    "hf_tfast.attention.window": ("Window",),
    "hf_tfast.hub.card": ("model_card",),
    "hf_tfast.hub.remote": ("save_code",),
    "hf_tfast.hub.share": ("push", "save"),
    "hf_tfast.compression": ("convert", "dequantise"),
    "hf_tfast.distillation.trainer": ("DistillationTrainer",),
    "hf_tfast.feed_forward.activation": ("Activation",),
    "hf_tfast.feed_forward.int8": ("Int8",),
    "hf_tfast.feed_forward.low_rank": ("LowRank",),
    "hf_tfast.feed_forward.pruned": ("Pruned",),
    "hf_tfast.feed_forward.tensor_train": ("TensorTrain",),
    "hf_tfast.integration._attention_map": ("attention_map",),
    "hf_tfast.integration.apply": ("apply_plan", "remove_plan"),
    "hf_tfast.integration.cache": ("cache_bytes",),
    "hf_tfast.integration.calibrate": ("calibrate",),
    "hf_tfast.integration.plan": ("FastPlan",),
    "hf_tfast.integration.report": ("attention_report",),
    "hf_tfast.models.configuration_tfast": ("TFastConfig",),
    "hf_tfast.models.configuration_tfast_seq2seq": ("TFastSeq2SeqConfig",),
    "hf_tfast.models.modeling_tfast": ("TFastForCausalLM", "TFastForMaskedLM", "TFastModel", "TFastPreTrainedModel"),
    "hf_tfast.models.modeling_tfast_heads": (
        "TFastForQuestionAnswering",
        "TFastForSequenceClassification",
        "TFastForTokenClassification",
    ),
    "hf_tfast.models.modeling_tfast_seq2seq": (
        "TFastForConditionalGeneration",
        "TFastSeq2SeqModel",
        "TFastSeq2SeqPreTrainedModel",
    ),
    "hf_tfast.parallel.pipeline": ("Pipeline",),
    "hf_tfast.parallel.sequence": ("SequenceParallel",),
    "hf_tfast.planner": ("propose_plan",),
    "hf_tfast.positions": ("extend_positions",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_tfast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


register()
register_models()
