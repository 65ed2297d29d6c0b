# /// script
# dependencies = ["hf_tfast[metrics]"]
# ///
r"""Score a trained model on rows it has not seen, and write what it says of each.

    accelerate launch --cpu --num_processes 1 --mixed_precision no recipes/evaluate_model.py --task translation \
        --model runs/translation/dense/model --test_file data/test.tsv.gz --columns source=0 target=1 \
        --per_device_eval_batch_size 64 --generation_num_beams 4 --predictions runs/said.jsonl --metrics runs/bleu.json

A dense model swapped to a mechanism without any training: add --attention '{"mechanism": "window", "window": 256}'.

Expected: the metrics as JSON on standard output; 1,000 short sentences take about a minute on 2 cores with 4 beams.
"""

import json

from transformers import HfArgumentParser

from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskTrainingArguments
from hf_tfast.training.tasks.evaluate import EvaluationArguments, evaluate_model
from hf_tfast.training.tasks.names import named_task

ARGUMENTS = (EvaluationArguments, TaskDataArguments, TaskTrainingArguments)


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser(ARGUMENTS, description=__doc__)
    given, data, training = parser.parse_args_into_dataclasses(arguments)
    record = evaluate_model(named_task(given.task), given, data, training)
    print(json.dumps(record["test"], indent=1))
    return record


if __name__ == "__main__":
    main()
