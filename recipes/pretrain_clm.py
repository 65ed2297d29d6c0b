# /// script
# dependencies = ["hf_tfast[plots]"]
# ///
r"""Train a causal TFast model from scratch and let it speak; or several mechanisms on the same data, side by side.

By default it reads the sources and documentation of the running Python; --text takes files, globs and folders,
--dataset a data set of the Hub. One model:

    accelerate launch --cpu --num_processes 1 recipes/pretrain_clm.py \
        --attention '{"mechanism": "window", "window": 256}' --output_dir runs/clm-window
"""

from transformers import HfArgumentParser

from hf_tfast.training.arguments import DataArguments, ModelArguments, PretrainingArguments
from hf_tfast.training.run import pretrain


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = HfArgumentParser((DataArguments, ModelArguments, PretrainingArguments), description=__doc__)
    records = pretrain(*parser.parse_args_into_dataclasses(arguments))
    for record in filter(None, records):
        print(f"{record['attention']}: {record['sample']['prompt']}[...]{record['sample']['continuation']}")
    return records


if __name__ == "__main__":
    main()
