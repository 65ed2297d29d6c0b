"""BLEU and chrF of a corpus, as sacrebleu computes them."""

from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from ._base import TEXT, TEXTS, Metric, several


class Bleu(Metric):
    """predictions: texts. references: a text each, or a list of texts; rows may have different numbers of them."""

    description_text = "BLEU (0 to 100) and chrF (0 to 100) of a corpus."
    source = "Post, 2018, https://aclanthology.org/W18-6319/; Popović, 2015, https://aclanthology.org/W15-3049/"
    kinds = ((TEXT, TEXT), (TEXT, TEXTS))

    def _compute(self, predictions: Any, references: Any, lowercase: bool = False) -> dict[str, Any]:
        """predictions: texts; references: one or several texts each; lowercase: compare without case."""
        lists = several(references)
        most = max(map(len, lists))
        columns = [[one[n] if n < len(one) else None for one in lists] for n in range(most)]
        bleu = BLEU(lowercase=lowercase)
        found = bleu.corpus_score(list(predictions), columns)  # type: ignore[arg-type]
        chrf = CHRF(lowercase=lowercase).corpus_score(list(predictions), columns)  # type: ignore[arg-type]
        return {
            "bleu": found.score,
            "chrf": chrf.score,
            "brevity_penalty": found.bp,
            "signature": str(bleu.get_signature()),
        }
