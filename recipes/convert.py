# /// script
# dependencies = ["hf_tfast[int8]"]
# ///
r"""Convert a dense model into a fast, small one, with a report of bytes, error and time of every layer.

    accelerate launch --cpu --num_processes 1 --mixed_precision no recipes/convert.py \
        --model sentence-transformers/all-MiniLM-L6-v2 --attention window:window=64,sinks=4 --feed_forward int8 \
        --calibration texts.txt --out runs/fast

Expected: runs/fast loads with plain AutoModel after `import hf_tfast`; runs/fast/conversion/report.md says what became
of every layer. All-MiniLM-L6-v2: under a minute on 2 cores. `tfast convert` is the same on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_tfast.compression.folder import Request, convert_folder, read_plan


@dataclass
class RecipeArguments:
    model: str = field(metadata={"help": "Hub id or folder of a dense model"})
    out: str = field(metadata={"help": "folder to make"})
    attention: str | None = field(default=None, metadata={"help": "window:window=256,sinks=4"})
    feed_forward: str | None = field(default=None, metadata={"help": "pruned:ratio=0.75 + low_rank:ratio=0.5 + int8"})
    plan: str | None = field(default=None, metadata={"help": "JSON file of a plan, instead of these two"})
    calibration: str | None = field(default=None, metadata={"help": "text like what the model will read"})
    length: int = field(default=512, metadata={"help": "tokens of a calibration row"})
    rounds: int = field(default=5, metadata={"help": "timed forwards of each model; 0: none"})


def main(arguments: list[str] | None = None) -> object:
    (given,) = HfArgumentParser(RecipeArguments, description=__doc__).parse_args_into_dataclasses(arguments)
    path = {name: Path(text) if text else None for name, text in (("p", given.plan), ("c", given.calibration))}
    plan = read_plan(path["p"], given.attention, given.feed_forward)
    request = Request(model=given.model, plan=plan, out=Path(given.out), calibration=path["c"], length=given.length,
                      rounds=given.rounds)  # fmt: skip
    report = convert_folder(request, print)
    print(report)
    return report


if __name__ == "__main__":
    main()
