"""Every family's certificate, on tiny models of random weights that react to every key.

The table in docs/parity.md is what is found here: `WRITE_TABLE=yes python -m pytest tests/parity/test_family_parity.py`
writes it, but for the column of vLLM, which `tests/on_vllm/test_vllm_parity.py` measures and writes.
"""

import parity_table
import pytest
from decoded import sharp
from training import OTHERS, QUICK

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.parity import certificate as parity

FAMILIES = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in [*OTHERS, "gemma3", "paligemma"]),
]
COLUMNS = {
    "padded": ("trainer, padded right", "trainer, padded left"),
    "packed": ("trainer, packed",),
    "generate": ("generate",),
    "generate, padded": ("generate, padded left",),
    "engine with rewinds": ("engine", "engine, rewinds", "engine, rewinds in a batch"),
}


def certificate_of(family: str) -> parity.Certificate:
    model, processor = sharp(family, **parity_table.SIZES.get(family, {}))
    collator = VisionCollator(processor)
    certificate = parity.begin(model, processor, parity_table.rows_for(family), collator, name=family)
    parity.decode_ways(certificate, model, processor)
    parity.train_ways(certificate, model, processor, collator)
    return certificate


def verdict(certificate: parity.Certificate, names: tuple[str, ...]) -> str:
    """What the ways of a column have in common."""
    words = set()
    for name in names:
        outcome, comparison = certificate.outcomes.get(name), certificate.comparisons.get(name)
        if outcome is None or outcome.readings is None:
            words.add(outcome.status if outcome else "refused")
        else:
            words.add(comparison.verdict(certificate.limits) if comparison else "reference")
    return " / ".join(sorted(words))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_the_certificate_finds(family):
    certificate = certificate_of(family)
    cells = [verdict(certificate, names) for names in COLUMNS.values()]
    if certificate.facts["engine"] != "rewinds":
        cells[-1] += ", recomputes"
    parity_table.check(family, dict(enumerate(cells)), (cells, certificate.failures))
    # a fault would have to be larger than what is allowed: a picture's is
    assert (
        certificate.control is None or certificate.picture_change()["least"] > 10 * certificate.limits.largest
    )
