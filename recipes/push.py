# /// script
# dependencies = ["hf_tfast"]
# ///
r"""Publish a trained or converted model with its card: what it runs, and what was measured of it.

    accelerate launch --cpu --num_processes 1 --mixed_precision no recipes/push.py \
        --model runs/translation/dense/model --name user/tfast-en-de --license apache-2.0 \
        --results docs/results/translation/from_scratch --remote_code true

Without --name nothing leaves the machine: --folder makes the same files for a look at them.

Expected: the address of the commit; seconds, and the upload of the weights. Needs `hf auth login` or HF_TOKEN.
"""

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from hf_tfast.compression.folder import model_class
from hf_tfast.hub.share import push, save


@dataclass
class RecipeArguments:
    model: str = field(metadata={"help": "folder of the model"})
    license: str = field(metadata={"help": "as the Hub names it: apache-2.0, mit, ..."})
    name: str | None = field(default=None, metadata={"help": "user/model on the Hub"})
    folder: str | None = field(default=None, metadata={"help": "make this folder instead of pushing"})
    results: list[str] = field(default_factory=list, metadata={"help": "files or folders of what was measured"})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the model it was made from"})
    description: str = field(default="", metadata={"help": "sentences of yours for the card"})
    remote_code: bool = field(default=False, metadata={"help": "let it load without hf_tfast, by trust_remote_code"})
    private: bool | None = field(default=None, metadata={"help": "a private repository, where it is new"})


def main(arguments: list[str] | None = None) -> str:
    (given,) = HfArgumentParser(RecipeArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    if (given.name is None) == (given.folder is None):
        raise ValueError("give either --name (push to the Hub) or --folder (make the files here)")
    model = model_class(AutoConfig.from_pretrained(given.model)).from_pretrained(given.model)
    options = {name: getattr(given, name) for name in ("results", "remote_code", "license", "description")}
    options["tokenizer"] = AutoTokenizer.from_pretrained(given.model)
    if given.base_model:
        options["base_model"] = given.base_model
    if given.folder is not None:
        made = str(save(model, given.folder, **options))
    else:
        made = push(model, given.name, private=given.private, **options)
    print(made)
    return made


if __name__ == "__main__":
    main()
