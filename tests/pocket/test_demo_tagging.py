"""The comparison of `data tag` rows with exact rows runs through, resumes, and reports how true its labels are."""

from io import StringIO

import pytest
from rich.console import Console

from vlm_sft_rl.demos import reverse as demo_reverse
from vlm_sft_rl.demos import tagging as demo_tagging
from vlm_sft_rl.io import write_jsonl
from vlm_sft_rl.pocket import dataset


def test_label_truth(tmp_path):
    def row(identity, answer):
        messages = [
            {"role": "user", "content": "<image>\nDescribe the image."},
            {"role": "assistant", "content": answer},
        ]
        return {"id": identity, "images": ["a.png"], "messages": messages}

    answers = [
        "<SPAN> In the room </CN> there is <SPAN> a moon </CN>, <SPAN> a star </CN>.",
        "There is <SPAN> a star </UN>",
        "There is <SPAN> a moon </UN>",
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [row(str(i), a) for i, a in enumerate(answers)])
    assert demo_tagging.label_truth(path, {"a.png": ["moon"]}) == {"true": 2, "false": 2}


@pytest.mark.slow
def test_the_comparison_runs_through_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("spacy")
    monkeypatch.setitem(dataset.SPLITS, "train", (60, 0.85))
    monkeypatch.setitem(dataset.SPLITS, "val", (100, 0.0))
    monkeypatch.setattr(demo_reverse, "THRESHOLDS", (0.1,))
    monkeypatch.setattr(demo_reverse, "VALIDATION_SCENES", 8)
    options = {"scenes": 20, "steps": 4, "console": Console(file=StringIO())}
    summary = demo_tagging.run(tmp_path, **options)
    systems = summary["systems"]
    assert set(systems) == set(demo_tagging.SYSTEMS.values()) and summary["n"] == 20
    assert systems["exact rows"]["labels"]["false"] == 0
    assert (
        systems["data tag"]["labels"]["false"]
        > 2 * systems["data tag, checked by the base"]["labels"]["false"]
    )
    again = demo_tagging.run(tmp_path, **options)
    assert again == summary
