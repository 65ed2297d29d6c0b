# /// script
# dependencies = ["hf_tfast[metrics]"]
# ///
r"""Translation, summarisation or dialogue: a pretrained model made fast, or a TFast model from scratch.

An encoder-decoder from scratch, three choices side by side on the same examples (tab-separated lines, English and
German; any JSONL, CSV or TSV with --columns source=... target=..., or --dataset NAME of the Hub):

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/finetune_seq2seq.py --task translation \
        --train_file data/train.tsv.gz --validation_file data/valid.tsv.gz --test_file data/test.tsv.gz \
        --columns source=0 target=1 --source_length 64 --target_length 64 --vocab_size 6000 --test_rows 1000 \
        --compare dense '{"mechanism": "window", "window": 4}' '{"feed_forward": {"form": "low_rank", "ratio": 0.5}}' \
        --max_steps 1200 --per_device_train_batch_size 32 --learning_rate 1.5e-3 --adam_beta2 0.98 \
        --label_smoothing_factor 0.1 --output_dir runs/translation --resume_from_checkpoint last

A student of half the size that learns what the first says (sequence-level distillation):

    accelerate launch --cpu --num_processes 1 --mixed_precision bf16 recipes/finetune_seq2seq.py --task translation \
        --train_file data/train.tsv.gz --validation_file data/valid.tsv.gz --test_file data/test.tsv.gz \
        --columns source=0 target=1 --source_length 64 --target_length 64 --train_rows 20000 --test_rows 1000 \
        --teacher runs/translation/dense/model --tokenizer runs/translation/tokenizer --hidden_size 160 --layers 2 \
        --max_steps 1200 --per_device_train_batch_size 32 --learning_rate 1.5e-3 --output_dir runs/translation-student

A pretrained model with a window, on documents and their summaries:

    accelerate launch recipes/finetune_seq2seq.py --task summarization --model facebook/bart-base \
        --train_file a.jsonl --columns source=article target=summary --early_stopping 3 \
        --attention '{"mechanism": "window", "window": 256}'

Expected: a table of the models in --output_dir. The first, on Tatoeba's sentences: BLEU 6.7 dense, 8.7 window, 5.0 low
rank in 26 minutes on one core that others used too (docs/results/translation/from_scratch/table.md).
"""

from dataclasses import dataclass, field
from functools import partial

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser

from hf_tfast.distillation.sequences import teacher_texts
from hf_tfast.training.tasks.arguments import TaskDataArguments, TaskModelArguments, TaskTrainingArguments
from hf_tfast.training.tasks.names import text_task
from hf_tfast.training.tasks.run import finetune


@dataclass
class RecipeArguments:
    task: str = field(metadata={"help": "translation, summarization or dialogue"})
    teacher: str | None = field(
        default=None, metadata={"help": "learn what this encoder-decoder makes of the sources"}
    )
    teacher_beams: int = field(default=1, metadata={"help": "beams of its search; 1 is greedy"})


ARGUMENTS = (RecipeArguments, TaskDataArguments, TaskModelArguments, TaskTrainingArguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = HfArgumentParser(ARGUMENTS, description=__doc__)
    recipe, data, model, training = parser.parse_args_into_dataclasses(arguments)
    rewrite = None
    if recipe.teacher is not None:
        teacher = AutoModelForSeq2SeqLM.from_pretrained(recipe.teacher)
        tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
        sizes = {"batch": training.per_device_eval_batch_size, "max_length": data.source_length}
        rewrite = partial(teacher_texts, teacher, tokenizer, beams=recipe.teacher_beams,
                          max_new_tokens=data.target_length, **sizes)  # fmt: skip
    return finetune(text_task(recipe.task, model.decoder_only), data, model, training, rewrite=rewrite)


if __name__ == "__main__":
    main()
