"""CIDEr and METEOR of region descriptions against reference expressions, by `pycocoevalcap` (extra: reg)."""

import re
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from .bootstrap import Interval, bootstrap


def reg_scores(
    descriptions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Corpus scores with bootstrap intervals over regions.

    METEOR and the Penn Treebank tokenizer of the published figures are Java programs: without `java` METEOR is left
    out and words are split at spaces and punctuation, which moves CIDEr in the third decimal on plain expressions.

    Args:
        descriptions: region id -> what the model said; references: region id -> what people said.

    Raises:
        UserError: pycocoevalcap is not installed, or a region has no reference.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise UserError("CIDEr and METEOR need pycocoevalcap: pip install 'vlm-sft-rl[reg]'.") from error
    if missing := [key for key in descriptions if not references.get(key)]:
        raise UserError(f"region {missing[0]!r} has no reference expression ({len(missing)} such regions).")
    said = {key: [text] for key, text in descriptions.items()}
    truth = {key: list(references[key]) for key in descriptions}
    java = shutil.which("java") is not None
    said, truth = _tokenised(said, java), _tokenised(truth, java)
    found = {"cider": np.asarray(Cider().compute_score(truth, said)[1])}
    if java:
        from pycocoevalcap.meteor.meteor import Meteor

        found["meteor"] = np.asarray(Meteor().compute_score(truth, said)[1])
    return {
        name: bootstrap(np.c_[values, np.ones(len(values))], _mean, rounds, seed)
        for name, values in found.items()
    }


def _mean(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def _tokenised(texts: dict[str, list[str]], java: bool) -> dict[str, list[str]]:
    if java:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        return PTBTokenizer().tokenize({key: [{"caption": t} for t in own] for key, own in texts.items()})
    return {key: [" ".join(re.findall(r"[\w']+", t.lower())) for t in own] for key, own in texts.items()}
