"""Region descriptions against what people said (REG): CIDEr-D, and METEOR by its authors' program."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ...errors import UserError
from .cider import Cider, mean_score, tokenize
from .regions import per

COLUMNS = ("score", "captions", "leaks", "words")


class Reg(Cider):
    """Referring expression generation by CIDEr-D (arXiv 1411.5726).

    `cider` as `Cider`; `leak_rate`: descriptions that spell coordinates; `words` of a description; `meteor` if asked for.

    `predictions` are `{"text", "leak"}`, `references` `{"captions", "image"}`. The unit of the bootstrap is the image.

    Args:
        meteor: METEOR 1.5 (Denkowski and Lavie, 2014) times 100, by `pycocoevalcap`, which runs its authors' Java program:
            the mean of the regions' own scores. The program's score of a corpus weighs regions by their length and
            differs a little.

    Raises:
        UserError: METEOR is asked for, and pycocoevalcap or Java is missing.
    """

    columns = COLUMNS
    statistics = {  # noqa: RUF012
        "cider": mean_score,
        "leak_rate": per("leaks", "captions", COLUMNS),
        "words": per("words", "captions", COLUMNS),
    }
    lower_is_better = frozenset({"leak_rate"})
    not_fractions = frozenset({"cider", "meteor", "words"})
    reference_fields = ("captions", "image")
    reference_feature = {  # noqa: RUF012
        "captions": datasets.Sequence(datasets.Value("string")),
        "image": datasets.Value("string"),
    }
    prediction_feature = {"text": datasets.Value("string"), "leak": datasets.Value("bool")}  # noqa: RUF012

    def __init__(self, meteor: bool = False, **kwargs):
        super().__init__(**kwargs)
        self._meteor = _load_meteor() if meteor else None
        if meteor:
            self.columns = (*COLUMNS, "meteor")
            self.statistics = {**self.statistics, "meteor": per("meteor", "captions", self.columns)}

    def prediction_of(self, sample: Mapping[str, Any]) -> dict:
        return {"text": sample["answer"], "leak": sample["leak"]}

    def check(self, reference) -> None:
        super().check(reference["captions"])

    def scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        cider = super().scores(predictions, references)
        if self._meteor is None:
            return cider
        said = {i: [" ".join(tokenize(text))] for i, text in enumerate(predictions)}
        truth = {i: [" ".join(tokenize(text)) for text in own] for i, own in enumerate(references)}
        return np.c_[cider, 100 * np.asarray(self._meteor.compute_score(truth, said)[1])]

    def per_sample(self, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> np.ndarray:
        texts = [one["text"] for one in predictions]
        scores = super().per_sample(texts, [reference["captions"] for reference in references])
        own = [(one["leak"], len(one["text"].split())) for one in predictions]
        # the base has CIDEr first, then 1, then what `scores` adds
        return np.c_[scores[:, :2], np.asarray(own, dtype=float).reshape(len(own), 2), scores[:, 2:]]

    def group_of(self, reference):
        return reference["image"]

    def group_counts(self, rows: np.ndarray, references) -> np.ndarray:
        return rows.sum(axis=0)

    def truth_text(self, reference) -> str:
        return super().truth_text(reference["captions"])


def _load_meteor():
    try:
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor()
    except ImportError as error:
        raise UserError("METEOR needs pycocoevalcap: pip install 'vlm-sft-rl[reg]'.") from error
    except FileNotFoundError as error:
        raise UserError("METEOR is a Java program, and `java` is not on this machine. Install it.") from error
