"""What the distillation of a language model is told."""

from dataclasses import dataclass
from typing import Any

from ..training.arguments import PretrainingArguments, _json, _option, read_attention
from ..training.scaling import check_whole_models
from .layerwise import LayerMatching
from .whole import LogitMatching

# Settings that a distillation cannot change between its beginning and its resumption, beside those of any training.
FIXED = (
    "layer_steps",
    "layer_learning_rate",
    "match",
    "one_at_a_time",
    "temperature",
    "divergence",
    "labels_weight",
    "hidden_weight",
    "lora_rank",
    "patience",
)


@dataclass
class StudentArguments:
    """Who teaches, and who learns."""

    teacher: str = _option("", "a causal model: a folder or a name of the Hub")
    students: list[str] = _option(
        ["window"], 'attention of each student: a name, or JSON: \'{"mechanism": "window", "window": 256}\''
    )
    smaller: str = _option("{}", "JSON of TFastConfig's fields: students of these sizes instead of the teacher's copy")
    teacher_int8: bool = _option(False, "the teacher's feed-forwards run in int8")
    cache: int = _option(0, "keep the teacher's so many most likely tokens on disk, and train from these; 0: no cache")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("name the teacher: --teacher runs/clm/model")
        if not self.students:
            raise ValueError("name at least one student: --students window")
        for given in self.students:
            read_attention(given)
        _json("--smaller", self.smaller)

    @property
    def sizes(self) -> dict[str, Any]:
        return _json("--smaller", self.smaller)


@dataclass
class DistillationArguments(PretrainingArguments):
    """TrainingArguments with these defaults; max_steps and learning_rate are those of stage 2."""

    output_dir: str | None = _option("runs/distill_lm", "a new folder for everything that the training leaves")
    max_steps: int = _option(300, "steps of stage 2; 0: none")
    learning_rate: float = _option(5e-4, "of stage 2, its highest value")
    eval_steps: float | None = _option(0.25, "steps (or share of them) between evaluations")
    layer_steps: int = _option(100, "steps of stage 1; 0: none")
    layer_learning_rate: float = _option(1e-3, "of stage 1, its highest value")
    match: str = _option("attention", "what stage 1 matches: 'attention' outputs, or 'block' outputs")
    one_at_a_time: bool = _option(False, "stage 1 trains one layer after the other: the least memory")
    temperature: float = _option(1.0, "of stage 2")
    divergence: str = _option("forward", "of stage 2: 'forward', 'reverse' or 'jsd'")
    labels_weight: float = _option(0.0, "of the cross-entropy with the texts themselves, in stage 2")
    hidden_weight: float = _option(0.0, "of the distance of hidden states, in stage 2")
    lora_rank: int = _option(0, "stage 2 trains LoRA adapters of this rank, merged afterwards; 0: all weights")
    patience: int = _option(0, "stop a stage after so many evaluations without a better loss; 0: never")
    speed_rounds: int = _option(5, "forwards of each model that are timed at the end, in turns")

    def __post_init__(self) -> None:
        if self.max_steps < 0 or self.layer_steps < 0 or self.max_steps + self.layer_steps == 0:
            raise ValueError(f"there are no steps: layer_steps={self.layer_steps}, max_steps={self.max_steps}")
        if self.patience:
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
        check_whole_models(self, "distillation")  # before processes meet
        super().__post_init__()
        self.layers, self.whole = self._objectives()

    def _objectives(self) -> tuple[LayerMatching, LogitMatching]:
        whole = LogitMatching(
            labels=self.labels_weight,
            hidden=self.hidden_weight,
            temperature=self.temperature,
            divergence=self.divergence,
        )
        return LayerMatching(match=self.match, one_at_a_time=self.one_at_a_time), whole

    def fixed(self) -> dict[str, Any]:
        """The settings on which the result depends."""
        return {**super().fixed(), **{name: getattr(self, name) for name in FIXED}}
