# /// script
# dependencies = ["hf_tfast[metrics]"]
# ///
r"""Extractive question answering: where in a context is the answer?

SQuAD's JSON, or rows of question, context and answers; paragraphs of one article stay on one side of the split:

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/qa.py \
        --model sentence-transformers/all-MiniLM-L6-v2 --compare dense '{"mechanism": "window", "window": 64}' \
        --train_file data/squad.json.gz --validation_share 0.25 --group_column title --source_length 384 \
        --learning_rate 2e-4 --num_train_epochs 3 --per_device_train_batch_size 8 --output_dir runs/qa

Expected: exact match and F1 of both models, with seconds, in runs/qa/table.md; on XQuAD's English, in two epochs
and 12 minutes on one core, F1 0.43 and 0.34 (docs/results/qa/table.md). A long context is cut into pieces that
overlap by --stride; with --positions 4096 --source_length 4096 and a window it is one piece.
"""

from transformers import HfArgumentParser

from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments
from hf_tfast.training.tasks.names import named_task
from hf_tfast.training.tasks.run import finetune

ARGUMENTS = (TaskDataArguments, TaskModelArguments, TaskTrainingArguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    data, model, training = HfArgumentParser(ARGUMENTS, description=__doc__).parse_args_into_dataclasses(arguments)
    return finetune(named_task("qa"), data, model, training)


if __name__ == "__main__":
    main()
