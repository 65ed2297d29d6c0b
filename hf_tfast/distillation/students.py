"""Students of a causal teacher: a copy of its weights with fast attention, or a smaller TFast model."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..integration.apply import apply_plan
from ..integration.plan import FastPlan
from ..models.configuration_tfast import TFastConfig
from ..models.modeling_tfast import TFastForCausalLM

__all__ = ["fast_copy", "load_teacher", "smaller"]


def load_teacher(name: str, int8: bool = False) -> PreTrainedModel:
    """A causal model from a folder or the Hub; `int8`: its feed-forwards in int8 (needs bitsandbytes)."""
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name)
    if int8:
        from ..feed_forward.int8 import Int8

        apply_plan(teacher, FastPlan(feed_forward=Int8()))
    return teacher.eval()


def fast_copy(name: str, attention: Any) -> PreTrainedModel:
    """The model in a folder (or of the Hub), its weights as they are, its attention as given: a mechanism, its dict,
    or a dict of layer ranges. TFast models have it in their config, others get a FastPlan."""
    if AutoConfig.from_pretrained(name).model_type == TFastConfig.model_type:
        return AutoModelForCausalLM.from_pretrained(name, attention=attention)
    return apply_plan(AutoModelForCausalLM.from_pretrained(name), FastPlan(attention=attention))


def smaller(teacher: PreTrainedConfig, attention: Any, fields: dict[str, Any]) -> PreTrainedModel:
    """A TFast model with random weights over the teacher's vocabulary; `fields` are those of TFastConfig."""
    theirs = teacher.get_text_config()
    special = {f"{role}_token_id": getattr(theirs, f"{role}_token_id", None) for role in ("pad", "bos", "eos")}
    same = {"vocab_size": theirs.vocab_size, "max_position_embeddings": theirs.max_position_embeddings, **special}
    width = fields.get("hidden_size")
    start = {"initializer_range": width**-0.5} if width else {}
    return TFastForCausalLM(TFastConfig(**{**same, **start, **fields, "attention": attention, "causal": True}))
