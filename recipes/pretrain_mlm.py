# /// script
# dependencies = ["hf_tfast[plots]"]
# ///
r"""Train a two-way TFast model to fill in masked tokens; or several mechanisms on the same data, side by side.

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/pretrain_mlm.py \
        --attention '{"mechanism": "window", "window": 128}' --output_dir runs/mlm-window

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/pretrain_mlm.py \
        --compare dense '{"mechanism": "window", "window": 128}' --max_steps 250 --validation_sequences 12 \
        --output_dir runs/pretrain_mlm --report docs/results/pretrain_mlm --resume_from_checkpoint last

Expected of the second: docs/results/pretrain_mlm/table.md; about 5 minutes on 2 cores with AVX-512 BF16. Texts, tokens
and options are those of pretrain_clm.py.
"""

from transformers import HfArgumentParser

from hf_tfast.training.arguments import DataArguments, ModelArguments, PretrainingArguments
from hf_tfast.training.run import pretrain


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = HfArgumentParser((DataArguments, ModelArguments, PretrainingArguments), description=__doc__)
    records = pretrain(*parser.parse_args_into_dataclasses(arguments), two_way=True)
    for record in filter(None, records):
        print(f"{record['attention']}: {record['sample']['prompt']}\n    {record['sample']['guesses']}")
    return records


if __name__ == "__main__":
    main()
