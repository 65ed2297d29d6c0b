# /// script
# dependencies = ["hf_tfast[plots]"]
# ///
r"""Distil a causal language model into fast copies of itself (or into a smaller TFast model), in two stages.

Stage 1 teaches each layer's fast attention to give what the teacher's dense attention gives on the same input; stage 2
lets the whole student follow the teacher's distribution over next tokens. The teacher is any causal model that
Transformers loads; texts are files, globs and folders (--text), or a data set of the Hub (--dataset).

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/distill_lm.py \
        --teacher runs/teacher/model --text books/train --validation_text books/valid \
        --students '{"mechanism": "hashed", "bits": 5, "rounds": 2, "cap": 64, "window": 128}' \
                   '{"mechanism": "window", "window": 256, "sinks": 4}' \
        --layer_steps 160 --max_steps 200 --learning_rate 1e-4 --eval_steps 0.5 --validation_sequences 24 \
        --output_dir runs/distill_lm --report docs/results/distill_lm --resume_from_checkpoint last

The teacher above comes from recipes/pretrain_clm.py with the same texts. Expected: docs/results/distill_lm/table.md,
in 18 minutes on one core with AVX-512 BF16 that others used too: perplexity 0.2 % above the teacher's for window and
0.7 % for hashed. Performer needs a training rather than a healing: 38 % after 280 steps at 1.5e-3
(docs/results/distill_lm_performer).
Stopped and started again, the same command goes on at the last checkpoint and keeps the students that are done.
--lora_rank 8 trains adapters in stage 2, --cache 64 reads the teacher's logits from disk (stage 2 only:
--layer_steps 0), --smaller '{"hidden_size": 128, "num_attention_heads": 4}' makes smaller students.
"""

from transformers import HfArgumentParser

from hf_tfast.distillation.arguments import DistillationArguments, StudentArguments
from hf_tfast.distillation.run import distill
from hf_tfast.training.arguments import DataArguments


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = HfArgumentParser((DataArguments, StudentArguments, DistillationArguments), description=__doc__)
    return distill(*parser.parse_args_into_dataclasses(arguments))


if __name__ == "__main__":
    main()
