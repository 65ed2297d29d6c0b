# /// script
# dependencies = ["hf_tfast[plots]"]
# ///
r"""Train a two-way TFast model to fill in masked tokens; or several mechanisms on the same data, side by side.

    accelerate launch --cpu --num_processes 1 recipes/pretrain_mlm.py \
        --attention '{"mechanism": "window", "window": 128}' --output_dir runs/mlm-window
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
