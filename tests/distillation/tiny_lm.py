"""Small teachers, their students and rows of tokens, for tests that train within a second."""

from copy import deepcopy

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_tfast import FastPlan, TFastConfig, TFastForCausalLM, Window, apply_plan
from hf_tfast.testing import generator
from hf_tfast.training.packing import IGNORED

VOCABULARY, LENGTH = 37, 12


class Rows(Dataset):
    """Rows of random tokens, right padded to one length, of very different lengths: input_ids, mask and labels."""

    def __init__(self, count=8, seed=0, masked=True):
        random = generator("rows", seed)
        self.rows = []
        for n in range(count):
            ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=random)
            size = LENGTH if n == 0 or not masked else int(torch.randint(2, LENGTH, (), generator=random))
            mask = (torch.arange(LENGTH) < size).long()
            row = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask > 0, IGNORED)}
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


def tfast(seed=0, attention=None, **fields):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = TFastConfig(
        causal=True, attention=attention, max_position_embeddings=64, pad_token_id=0,
        initializer_range=0.3, **{"intermediate_size": 24, **sizes, **fields},
    )  # fmt: skip
    return TFastForCausalLM(config)


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY, intermediate_size=24, initializer_range=0.3, max_position_embeddings=64, pad_token_id=0,
        **{**sizes, **fields},
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windowed(teacher, window=3):
    """A copy with the teacher's weights, and windows."""
    return apply_plan(deepcopy(teacher), FastPlan(attention=Window(window=window)))


def arguments(out, **given):
    quick = {
        "use_cpu": True, "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(out), **{**quick, **given})
