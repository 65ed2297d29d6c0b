"""Small data of every task, and arguments of trainings that take a second."""

import json
import random
import shlex

WORDS = {"red": "rot", "dog": "Hund", "cat": "Katze", "old": "alt", "big": "groß", "house": "Haus", "sees": "sieht"}
SMALL = shlex.split(
    "--hidden_size 16 --layers 1 --heads 2 --intermediate_size 32 --vocab_size 300 --max_steps 2 --logging_steps 1 "
    "--per_device_train_batch_size 4 --eval_steps 1 --save_steps 1 --disable_tqdm true --use_cpu true "
    "--report_to none --source_length 24 --target_length 12"
)


def sentences(count, seed=0):
    """(English, German) of random words."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = draw.choices(list(WORDS), k=draw.randrange(2, 6))
        found.append((" ".join(words), " ".join(WORDS[word] for word in words)))
    return found


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_file(folder, count=20):
    path = folder / "pairs.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in sentences(count)), encoding="utf-8")
    return path


def classes_file(folder, count=20):
    """Is there a dog? Half yes."""
    rows = [{"text": f"{a} {'dog' if n % 2 else 'cat'}", "label": "yes" if n % 2 else "no"}
            for n, (a, _) in enumerate(sentences(count))]  # fmt: skip
    return write_jsonl(folder / "classes.jsonl", rows)


def tags_file(folder, count=20):
    rows = []
    for a, _ in sentences(count):
        words = [*a.split(), "big", "dog"]
        rows.append({"tokens": words, "tags": [*["O"] * (len(words) - 2), "B-ANIMAL", "I-ANIMAL"]})
    return write_jsonl(folder / "tags.jsonl", rows)


def questions_file(folder, count=12):
    """SQuAD's form: two questions a paragraph, one paragraph an article."""
    parts = []
    for n, (a, _) in enumerate(sentences(count)):
        context = f"the {a} is here. The answer is number {n} today."
        start = context.index(f"number {n}")
        qas = [{"id": f"{n}-{k}", "question": f"which {k} number?",
                "answers": [{"text": f"number {n}", "answer_start": start}]} for k in range(2)]  # fmt: skip
        parts.append({"title": f"t{n}", "paragraphs": [{"context": context, "qas": qas}]})
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": parts}), encoding="utf-8")
    return path


def dialogues_file(folder, count=8):
    rows = [{"turns": [a for a, _ in sentences(4, seed=n)]} for n in range(count)]
    return write_jsonl(folder / "dialogues.jsonl", rows)


def tiny_bert(folder):
    """A random BERT with a WordPiece tokenizer of the words above; takes pairs of texts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = "the is here answer number today which which ? . " + " ".join(WORDS) + " " + " ".join(map(str, range(40)))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words.split())]
    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder
