"""Every name of Transformers, accelerate, torch and bitsandbytes in use that their authors may move without notice.

A table for tests/integration/test_canary.py: what it is, which file leans on it, what for. Three kinds:

    Name    an attribute that must exist; with `takes`, a function that must accept these parameters.
    Word    text that must stand in a piece of source: attributes that only exist on live objects, literals that are
            searched for, names in the environment.
    Made    attributes of an object that has to be made first.

Plain imports need no row: the canary reads them from the package. Nothing here imports hf_tfast, so that a missing
name is reported by its name, and not as a package that cannot be imported.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

VERSIONED = ("transformers", "accelerate", "torch", "bitsandbytes", "peft", "huggingface_hub")


@dataclass(frozen=True, kw_only=True)
class Hook:
    """`where` is "module:attribute.attribute"; `user` the file under hf_tfast/ that needs it, `need` what for."""

    where: str
    user: str
    need: str

    def fault(self) -> str | None:
        """What is wrong, None where all is well."""
        raise NotImplementedError

    @property
    def id(self) -> str:
        return self.where.replace(":", ".")

    def told(self, fault: str) -> str:
        library = self.where.split(".")[0].split(":")[0]
        return (
            f"{library} {import_module(library).__version__}: {self.where} {fault}. hf_tfast/{self.user} needs it: "
            f"{self.need}. Look at what {library} has there now, and at that file; then bring this row up to date"
        )


@dataclass(frozen=True, kw_only=True)
class Name(Hook):
    takes: tuple[str, ...] = ()

    def fault(self) -> str | None:
        try:
            found = resolve(self.where)
        except (ImportError, AttributeError) as error:
            return f"is gone ({error})"
        if not self.takes:
            return None
        parameters = inspect.signature(found).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None
        missing = [name for name in self.takes if name not in parameters]
        return f"takes {list(parameters)} and no longer {missing}" if missing else None


@dataclass(frozen=True, kw_only=True)
class Word(Hook):
    text: str

    def fault(self) -> str | None:
        try:
            source = inspect.getsource(resolve(self.where))
        except (ImportError, AttributeError, OSError) as error:
            return f"cannot be read ({error})"
        return None if self.text in source else f"does not say {self.text!r} any more"

    @property
    def id(self) -> str:
        return f"{super().id}[{self.text}]"


@dataclass(frozen=True, kw_only=True)
class Made(Hook):
    has: tuple[str, ...]
    make: Callable[[Any], Any] = lambda cls: cls()

    def fault(self) -> str | None:
        try:
            made = self.make(resolve(self.where))
        except Exception as error:  # whatever it is, the object cannot be made as the package makes it
            return f"cannot be made ({error!r})"
        missing = [name for name in self.has if not hasattr(made, name)]
        return f"has objects without {missing}" if missing else None


def resolve(where: str) -> Any:
    """The object at "module:attribute.attribute"; the module alone without a colon."""
    module, _, path = where.partition(":")
    found = import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _names(owner: str, user: str, need: str, **members: tuple[str, ...]) -> list[Hook]:
    return [Name(where=f"{owner}.{name}", user=user, need=need, takes=takes) for name, takes in members.items()]


MASKS, CACHES = "transformers.masking_utils", "transformers.cache_utils"
CONFIG = "transformers.configuration_utils"
BASE, LOADING = "transformers.modeling_utils", "transformers.core_model_loading"
QUANTIZER = "transformers.quantizers.base"
TRAINER = "transformers.trainer:Trainer"
MODULE = "torch.nn.modules.module:Module"

ATTENTION: list[Hook] = [
    Name(where=f"{BASE}:AttentionInterface.register", user="integration/interface.py",
         need="adds tfast and tfast_<mechanism>", takes=("key", "value")),
    Name(where=f"{BASE}:AttentionInterface._global_mapping", user="benchmarking/captured.py",
         need="asks whether a name is registered"),
    Name(where=f"{MASKS}:AttentionMaskInterface.register", user="integration/interface.py",
         need="the mask function of each name; without one Transformers passes no mask", takes=("key", "value")),
    Name(where=f"{MASKS}:ALL_MASK_ATTENTION_FUNCTIONS", user="integration/_attention_map.py",
         need="the mask function of the attention that is being watched"),
    Name(where=f"{BASE}:ALL_ATTENTION_FUNCTIONS.get_interface", user="models/modeling_tfast_layers.py",
         need="how a module finds its attention function", takes=("attn_implementation", "default")),
    Word(where="transformers.models.llama.modeling_llama:LlamaAttention.forward",
         text="ALL_ATTENTION_FUNCTIONS.get_interface(", user="integration/_modules.py",
         need="the text by which an attention module is known to go through the interface"),
    Word(where="transformers.models.t5.modeling_t5", text="position_bias=", user="integration/_modules.py",
         need="the text by which a module with a bias for every score is known"),
    Name(where=f"{CONFIG}:PreTrainedConfig._attn_implementation", user="integration/apply.py",
         need="the name of the attention that runs; set to {'': 'tfast'}, it leaves sub-configs alone"),
    Word(where=f"{CONFIG}:PreTrainedConfig", text="_attn_implementation_internal",
         user="integration/_attention_map.py", need="sets the name of one layer without touching sub-configs"),
    Word(where=f"{CONFIG}:PreTrainedConfig", text='"_is_quantized"', user="integration/apply.py",
         need="the mark of quantised weights, taken off models whose weights hold no integers"),
    Name(where=f"{CONFIG}:PreTrainedConfig.sub_configs", user="integration/_modules.py",
         need="the parts of a composite model"),
    Name(where=f"{CONFIG}:PreTrainedConfig.get_text_config", user="integration/quantizer.py",
         need="which part an attn_implementation speaks of"),
    Word(where="torch.distributed.tensor.experimental._context_parallel._attention", text="_replaced_functions",
         user="integration/interface.py", need="whether context parallel is active, which would give wrong numbers"),
]  # fmt: skip

MASK_FUNCTIONS: list[Hook] = [
    Name(where=f"{MASKS}:{name}", user="integration/masks.py", need="mask functions are taken apart by their names")
    for name in (
        "and_masks",
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
        "chunked_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
    )
] + [
    Name(where=f"{MASKS}:create_causal_mask", user="models/modeling_tfast.py", need="the mask of our decoders",
         takes=("config", "inputs_embeds", "attention_mask", "past_key_values", "position_ids", "and_mask_function")),
    Name(where=f"{MASKS}:create_bidirectional_mask", user="models/modeling_tfast.py", need="the mask of our encoders",
         takes=("config", "inputs_embeds", "attention_mask", "encoder_hidden_states", "and_mask_function")),
    Name(where=f"{MASKS}:find_packed_sequence_indices", user="models/modeling_tfast.py",
         need="which document a token belongs to", takes=("position_ids",)),
]  # fmt: skip

PLANS: list[Hook] = [
    Name(where="transformers.quantizers:register_quantizer", user="integration/quantizer.py",
         need="adds the method tfast", takes=("name",)),
    Name(where="transformers.quantizers:register_quantization_config", user="integration/quantizer.py",
         need="adds the method tfast", takes=("method",)),
    Name(where="transformers.quantizers:AutoHfQuantizer.from_config", user="integration/_inner.py",
         need="makes the quantiser of a plan's base", takes=("pre_quantized",)),
    *_names(f"{QUANTIZER}:HfQuantizer", "integration/quantizer.py", "a plan is applied and saved by these hooks",
            update_attn_implementation=("config",),
            _process_model_before_weight_loading=("model",),
            _process_model_after_weight_loading=("model",),
            is_serializable=(), is_trainable=(), is_qat_trainable=(), is_compileable=(),
            param_needs_quantization=("model", "param_name"),
            get_new_dtype=("converter", "param", "dtype"),
            get_state_dict_and_metadata=("model",),
            update_parallel_plan=("model", "plan")),
    *_names(f"{QUANTIZER}:HfQuantizer", "integration/_inner.py", "left to the quantiser of a plan's base",
            serialized_names=(), quantized_element_size=(),
            validate_environment=(), update_dtype=("dtype",), update_device_map=("device_map",),
            adjust_max_memory=("max_memory",), param_element_size=("model", "param_name", "param"),
            get_quantize_ops=(), get_load_operations=(), get_weight_conversions=(),
            update_weight_conversions=("weight_conversions", "model"),
            _convert_model_for_quantization=("model",), _dequantize=("model", "dtype")),
    Word(where=QUANTIZER, text="config._is_quantized = True", user="integration/apply.py",
         need="where Transformers marks configs, which a plan undoes"),
    Word(where=f"{BASE}:PreTrainedModel.from_pretrained", text="hf_quantizer.postprocess_model(",
         user="integration/quantizer.py", need="a plan is finished after the weights have been read"),
    Word(where=f"{BASE}:PreTrainedModel.save_pretrained", text="hf_quantizer.get_state_dict_and_metadata(self)",
         user="integration/quantizer.py", need="saving asks the plan first"),
    Word(where=LOADING, text="model._weight_conversions = ", user="integration/_inner.py",
         need="conversions of a base have no way back and are taken out before saving"),
    Word(where="transformers.integrations.bitsandbytes", text="self.hf_quantizer = hf_quantizer",
         user="integration/_inner.py", need="tells the base's conversions from the model's own"),
    *_names("transformers.utils.quantization_config:QuantizationConfigMixin", "integration/plan.py",
            "a plan travels as quantization_config",
            from_dict=("config_dict", "return_unused_kwargs"), to_dict=(), to_json_string=("use_diff",)),
    Word(where=f"{BASE}:PreTrainedModel", text="_is_hf_initialized", user="integration/_basis.py",
         need="tells tensors that a checkpoint has filled from empty ones"),
    Name(where="transformers.distributed.mixin:DistributedMixin._mesh_manager", user="integration/quantizer.py",
         need="this process's place among those that share tensors"),
    Name(where="transformers.distributed.mixin:DistributedMixin._tp_size", user="integration/_sharding.py",
         need="whether tensors are being shared"),
    Name(where="transformers.distributed.mixin:DistributedMixin._fsdp_size", user="integration/_sharding.py",
         need="whether weights are being shared"),
    Word(where="accelerate.hooks", text="_hf_hook", user="integration/apply.py", need="finds offloaded modules"),
    Word(where="torch.distributed.fsdp._common_utils", text="_fsdp_flattened", user="integration/apply.py",
         need="finds weights that FSDP has cut"),
]  # fmt: skip

CACHE: list[Hook] = [
    *_names(f"{CACHES}:DynamicLayer", "integration/caches/store.py", "our cache layers answer these calls",
            update=("key_states", "value_states"), lazy_initialization=("key_states", "value_states"),
            crop=("tokens_to_remove",), reset=()),
    *_names(f"{CACHES}:DynamicLayer", "integration/caches/_own.py", "our cache layers answer these calls",
            get_mask_sizes=("query_length",), get_seq_length=(),
            reorder_cache=("beam_idx",), batch_repeat_interleave=("repeats",), batch_select_indices=("indices",)),
    Name(where=f"{CACHES}:DynamicSlidingWindowLayer.activate_past_recording", user="integration/caches/_own.py",
         need="assisted generation asks for what a crop may need by this name"),
    Made(where=f"{CACHES}:DynamicLayer", has=("is_initialized",), user="integration/cache.py",
         need="only a layer that holds nothing yet is swapped"),
    Made(where=f"{CACHES}:DynamicCache", has=("layers", "layer_class_to_replicate", "offloading"),
         user="integration/cache.py", need="finds the layer of a module, and whether one may be made"),
    Name(where=f"{CACHES}:EncoderDecoderCache", user="integration/cache.py", need="self_attention_cache",
         takes=()),
]  # fmt: skip

MODELS: list[Hook] = [
    *_names(f"{BASE}:PreTrainedModel", "models/modeling_tfast.py", "our models set or override it",
            _can_record_outputs=(), _no_split_modules=(), _skip_keys_device_placement=(), _tied_weights_keys=(),
            _supports_attention_backend=(), _supports_flash_attn=(), _supports_flex_attn=(), _supports_sdpa=(),
            _tp_plan=(), _pp_plan=(), _fsdp_plan=(), _init_weights=("module",),
            _initialize_weights=("module", "is_custom_code"),
            get_correct_attn_implementation=("requested_attention", "is_init_check"), post_init=()),
    Name(where=f"{BASE}:PreTrainedModel._from_config", user="benchmarking/whole_models.py",
         need="makes a model with a chosen attention", takes=("config",)),
    *_names(f"{CONFIG}:PreTrainedConfig", "models/configuration_tfast.py", "our config sets or overrides it",
            base_model_tp_plan=(), base_model_pp_plan=(), validate=(), validate_architecture=(),
            convert_rope_params_to_dict=()),
    Name(where="transformers.utils.output_capturing:OutputRecorder", user="models/modeling_tfast_seq2seq.py",
         need="tells self- from cross-attention in outputs", takes=("target_class", "index", "layer_name")),
    Name(where=f"{BASE}:slice_logits_to_keep", user="models/modeling_tfast.py", need="logits_to_keep",
         takes=("hidden_states", "logits_to_keep")),
    Name(where="transformers.modeling_rope_utils:dynamic_rope_update", user="models/modeling_tfast_layers.py",
         need="rotary frequencies that depend on the length"),
    Name(where="transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS", user="models/modeling_tfast_layers.py",
         need="kinds of rotary frequencies"),
    Made(where="transformers.models.auto.modeling_auto:AutoModel", make=lambda cls: cls._model_mapping,
         has=("_extra_content",), user="hub/remote.py", need="which Auto classes know a model of ours"),
    Name(where="transformers.models.auto.modeling_auto:AutoModel._model_mapping", user="hub/remote.py",
         need="which Auto classes know a model of ours"),
    Name(where="transformers.dynamic_module_utils:get_relative_imports", user="hub/remote.py",
         need="what Transformers would copy beside a model's code", takes=("module_file",)),
    Name(where=f"{BASE}:PreTrainedModel.is_remote_code", user="models/_sharing.py",
         need="whether Transformers has copied the file of a class"),
    Name(where="transformers.models.reformer.modeling_reformer:LSHSelfAttention._set_num_buckets",
         user="benchmarking/peer_modules.py", need="before its first call", takes=("sequence_length",)),
]  # fmt: skip

TRAINING: list[Hook] = [
    *_names(TRAINER, "training/scaled.py", "layouts of processes override it",
            _build_accelerator_args=(), create_accelerator_and_postprocess=(),
            _sync_replicated_trainable_parameters=("model",), _track_num_input_tokens=("inputs",),
            _save_checkpoint=("model", "trial"), _get_output_dir=("trial",),
            _save_optimizer_and_scheduler=("output_dir",), _load_optimizer_and_scheduler=("checkpoint",),
            _load_from_checkpoint=("resume_from_checkpoint", "model"), _load_best_model=(), _run_epoch=()),
    *_names(TRAINER, "training/piped.py", "a pipeline overrides it",
            _clip_grad_norm=("model",), _get_grad_norm=("model", "grad_norm"), save_model=("output_dir",)),
    *_names(TRAINER, "training/tasks/trainer.py", "task trainers override it",
            _get_train_sampler=("train_dataset",), _get_eval_sampler=("eval_dataset",),
            get_optimizer_cls_and_kwargs=("args", "model"), evaluation_loop=("dataloader", "description")),
    *_names(TRAINER, "distillation/trainer.py", "distillation overrides it",
            _get_num_items_in_batch=("batch_samples", "device"), create_scheduler=("num_training_steps", "optimizer"),
            compute_loss=("model", "inputs", "return_outputs", "num_items_in_batch")),
    Word(where=f"{TRAINER}.create_accelerator_and_postprocess", text="self._build_accelerator_args(",
         user="training/scaled.py", need="the arguments of the accelerator pass through it"),
    Word(where=f"{TRAINER}._save_checkpoint", text="self._get_output_dir(", user="training/scaled.py",
         need="a checkpoint is written where this says, and moved when it is whole"),
    Name(where="transformers.trainer_utils:rotate_checkpoints", user="training/faults.py",
         need="deletes old checkpoints", takes=("output_dir", "save_total_limit", "best_model_checkpoint")),
    Name(where="transformers.trainer_callback:ExportableState.state", user="training/scaled.py",
         need="what a callback keeps in a checkpoint"),
    Word(where="transformers.training_args:TrainingArguments", text="_n_gpu", user="training/launch.py",
         need="a setting that may differ between processes"),
    Name(where="transformers.distributed.parallel_utils:replace_layer_number_by_wildcard", user="training/scaled.py",
         need="names of weights in sharding rules"),
    Word(where="accelerate.accelerator:Accelerator", text="self._dataloaders = []", user="training/scaled.py",
         need="loaders that accelerate must know about"),
    Word(where="accelerate.accelerator:Accelerator", text="_is_accelerate_prepared", user="training/scaled.py",
         need="a loader is not prepared twice"),
    Name(where="accelerate.data_loader:prepare_data_loader", user="training/scaled.py", need="shares rows out",
         takes=("num_processes", "process_index", "put_on_device", "rng_types", "even_batches",
                "use_seedable_sampler", "data_seed", "non_blocking")),
    Name(where="accelerate.local_sgd:LocalSGD._sync_and_avg_model_params", user="training/averaging.py",
         need="makes the processes equal before a checkpoint"),
    Word(where="accelerate.local_sgd:LocalSGD", text="self.local_sgd_steps", user="training/averaging.py",
         need="when the next average is due"),
    Word(where="accelerate.state", text="ACCELERATE_MIXED_PRECISION", user="training/guards.py",
         need="what the launcher asked for is read from the environment"),
    Word(where="accelerate.state", text="ACCELERATE_USE_CPU", user="training/guards.py",
         need="what the launcher asked for is read from the environment"),
    Word(where="accelerate.state", text="ACCELERATE_USE_FSDP", user="training/layout.py",
         need="what the launcher asked for is read from the environment"),
    Word(where="evaluate.module:EvaluationModule", text="_compute", user="metrics/_base.py",
         need="what compute calls"),
    Name(where="evaluate.module:EvaluationModule._info", user="metrics/_base.py", need="what a metric says of itself"),
]  # fmt: skip

TORCH: list[Hook] = [
    Made(where=MODULE, user="integration/cache.py", need="hooks and buffers are found and taken out by name",
         has=("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_backward_hooks", "_buffers",
              "_modules", "_parameters", "_non_persistent_buffers_set", "_state_dict_pre_hooks")),
    *_names(MODULE, "feed_forward/int8.py", "how the layers of int8 are saved, loaded and moved",
            _save_to_state_dict=("destination", "prefix", "keep_vars"),
            _load_from_state_dict=("state_dict", "prefix"), _apply=("fn", "recurse")),
    Name(where="torch:_int_mm", user="backends/int8_steps.py", need="the product of int8 matrices"),
    Name(where="torch:_check", user="backends/int8.py", need="shapes under torch.compile"),
    Name(where="torch:_assert_async", user="integration/masks.py", need="an exported program checks its positions"),
    Name(where="torch:ops.aten._softmax_backward_data", user="backends/blocks.py", need="the softmax's backward"),
    Name(where="torch:Tensor._version", user="integration/masks.py", need="whether a mask was changed in place"),
    Name(where="torch.utils._python_dispatch:TorchDispatchMode", user="testing.py", need="counts operations"),
    Name(where="bitsandbytes.nn:Int8Params", user="feed_forward/int8.py", need="int8 weights as bitsandbytes has them",
         takes=("data", "requires_grad", "has_fp16_weights")),
    Made(where="bitsandbytes.nn:Linear8bitLt", make=lambda cls: cls(2, 2, False, False, device="meta").state,
         has=("CB", "SCB", "threshold"), user="feed_forward/int8.py", need="where bitsandbytes looks for codes"),
    Name(where="bitsandbytes.nn:Linear8bitLt.init_8bit_state", user="feed_forward/int8.py", need="overridden"),
]  # fmt: skip

HOOKS: list[Hook] = [*ATTENTION, *MASK_FUNCTIONS, *PLANS, *CACHE, *MODELS, *TRAINING, *TORCH]
