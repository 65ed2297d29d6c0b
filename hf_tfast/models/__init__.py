"""Models of our own, for training from scratch and for distilling into: TFastConfig, TFastModel and its heads.

`register_models` only adds keys to Transformers' Auto classes; every entry that exists stays the same object.
"""

__all__ = ["register_models"]


def register_models() -> None:
    """Let AutoConfig and AutoModelFor... know the TFast family. Called once, by `import hf_tfast`."""
    from transformers.models.auto import configuration_auto, modeling_auto

    from . import modeling_tfast as lm
    from . import modeling_tfast_heads as heads
    from . import modeling_tfast_seq2seq as seq2seq
    from .configuration_tfast import TFastConfig
    from .configuration_tfast_seq2seq import TFastSeq2SeqConfig

    configuration_auto.AutoConfig.register(TFastConfig.model_type, TFastConfig, exist_ok=True)
    for auto, model in (
        (modeling_auto.AutoModel, lm.TFastModel),
        (modeling_auto.AutoModelForCausalLM, lm.TFastForCausalLM),
        (modeling_auto.AutoModelForMaskedLM, lm.TFastForMaskedLM),
        (modeling_auto.AutoModelForSequenceClassification, heads.TFastForSequenceClassification),
        (modeling_auto.AutoModelForTokenClassification, heads.TFastForTokenClassification),
        (modeling_auto.AutoModelForQuestionAnswering, heads.TFastForQuestionAnswering),
    ):
        auto.register(TFastConfig, model, exist_ok=True)
    configuration_auto.AutoConfig.register(TFastSeq2SeqConfig.model_type, TFastSeq2SeqConfig, exist_ok=True)
    modeling_auto.AutoModel.register(TFastSeq2SeqConfig, seq2seq.TFastSeq2SeqModel, exist_ok=True)
    generation = seq2seq.TFastForConditionalGeneration
    modeling_auto.AutoModelForSeq2SeqLM.register(TFastSeq2SeqConfig, generation, exist_ok=True)
