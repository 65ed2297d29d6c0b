# /// script
# dependencies = ["hf_tfast[demo,int8]"]
# ///
r"""Make a sentence encoder long and fast, heal it, and measure it against its teacher and the dense rivals.

The encoder's positions are extended to --length and its attention becomes a window. Then it learns from queries and
their documents (--pairs), and from texts alone (--documents), out of which sentences are taken as queries; close to
what its teacher makes of queries and of single passages. What shares text with --evaluate or --validation is left out
of the training. Offline, with all-MiniLM-L6-v2 from its package and Python's own documentation alone:

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/distill_encoder.py \
        --output_dir runs/distill_encoder

With questions and summaries of stories (SQuALITY), and books; the checkpoint that is best on other stories is kept:

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/distill_encoder.py \
        --pairs data/squality_train.jsonl --documents 'data/gutenberg_books/train/*.txt' python \
        --validation data/squality_dev_questions.jsonl data/squality_dev_summaries.jsonl \
        --evaluate questions=data/squality_test_questions.jsonl summaries=data/squality_test_summaries.jsonl python \
        --train_length 1024 --per_device_train_batch_size 24 --recompute false \
        --output_dir runs/distill_encoder --report docs/results/distill_encoder

Expected: docs/results/distill_encoder/table.md. MRR of stories by their questions: 0.478 by averaged chunks, 0.420
dense, 0.469 untrained, 0.539 healed with int8, at 3.1 times the documents/s of dense. It took 33 minutes on one
core that others used too; a step of 16 documents of 2048 tokens takes about 9 seconds for the documents alone on 2
cores with AVX-512 BF16 (`--recompute false --train last:3`; 12 with lora:16, 13 with all).

A training that was stopped goes on with --resume_from_checkpoint last; --stages quality speed measures again without
training. On a GPU leave out --cpu.
"""

from transformers import HfArgumentParser

from hf_tfast.distillation.encoder import EncoderArguments
from hf_tfast.quickstart.healing import HealingArguments, heal


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser((HealingArguments, EncoderArguments), description=__doc__)
    return heal(*parser.parse_args_into_dataclasses(arguments))


if __name__ == "__main__":
    main()
