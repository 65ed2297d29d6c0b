# /// script
# dependencies = ["hf_tfast[metrics]"]
# ///
r"""Classes of texts (--kind sequence) or of tokens (--kind token): a pretrained model made fast, or one from scratch.

Long texts, dense and with a window on the same examples (JSONL with text and label; other names by --columns). Reviews
of about 4,000 bytes, from scratch, in tokens learned from them; or --model with --positions for a pretrained encoder:

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/classify.py --kind sequence \
        --train_file data/train.jsonl.gz --validation_file data/valid.jsonl.gz --test_file data/test.jsonl.gz \
        --compare dense '{"mechanism": "window", "window": 64}' --source_length 1024 --hidden_size 64 --layers 2 \
        --heads 2 --intermediate_size 176 --dropout 0.2 --token_dropping 0.2 --weight_decay 0.1 \
        --per_device_train_batch_size 16 --num_train_epochs 4 --learning_rate 3e-3 --output_dir runs/classify

Entities: rows with `tokens` and `tags` (O, B-KIND, I-KIND); or texts whose labels are made by regular expressions:

    accelerate launch recipes/classify.py --kind token --model sentence-transformers/all-MiniLM-L6-v2 \
        --train_file data/train.jsonl.gz --test_file data/test.jsonl.gz --columns text=turns \
        --label_patterns '{"TIME": "\\d{1,2}(:\\d\\d)? ?[ap]m", "MONEY": "\\$\\d+"}' --output_dir runs/tags

Optimisers on the same run, each with its learning rate:

    accelerate launch recipes/classify.py --kind sequence --train_file a.csv --columns text=text label=category \
        --compare_optim adamw=1e-3 sgd=0.5 adagrad=0.01 adadelta=1.0 adamw_8bit=1e-3 --output_dir runs/optimisers

Expected: a table of the models in --output_dir; of the last, docs/results/classification/optimisers/table.md (five
trainings of 200 steps, a few seconds each on one core).
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments
from hf_tfast.training.tasks.names import label_task
from hf_tfast.training.tasks.run import finetune


@dataclass
class RecipeArguments:
    kind: str = field(default="sequence", metadata={"help": "sequence: a class of each text; token: of each word"})


ARGUMENTS = (RecipeArguments, TaskDataArguments, TaskModelArguments, TaskTrainingArguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = HfArgumentParser(ARGUMENTS, description=__doc__)
    recipe, data, model, training = parser.parse_args_into_dataclasses(arguments)
    return finetune(label_task(recipe.kind), data, model, training)


if __name__ == "__main__":
    main()
