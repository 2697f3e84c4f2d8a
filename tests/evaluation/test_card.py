import json

import pytest
from huggingface_hub import ModelCard

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.pages import update_card


def write_run(folder, spec="pope", value=0.859, judge=None):
    summary = {
        "spec": spec,
        "description": "Existence | questions",
        "decoder": "retrospective",
        "threshold": 0.5,
        "metrics": {"f1": {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9000}},
        "n": 9000,
        "seed": 0,
        "config": {"level": 0.95, "rounds": 100},
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | ({"judge": {"model": judge}} if judge else {})))
    return folder


def test_a_card_gets_metadata_and_a_table_and_keeps_the_rest(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\ntags: [reverse]\n---\n# My model\n\nText of mine.\n")
    update_card(readme, [write_run(tmp_path / "a"), write_run(tmp_path / "b", "mm_vet", 0.3, "judge-1")])
    card = ModelCard.load(readme)
    assert card.data.license == "mit" and card.data.tags == ["reverse"] and "Text of mine." in card.text
    results = {(r.dataset_type, r.metric_type): r for r in card.data.eval_results}
    assert results["pope", "f1"].metric_value == 0.859
    assert results["pope", "f1"].metric_args == {"low": 0.849, "high": 0.869}
    assert results["mm_vet", "f1"].dataset_args["decoding"] == "retrospective, τ = 0.5, judged by judge-1"
    assert "| pope | f1 | 0.859 | 0.849 to 0.869 | 9000 | retrospective, τ = 0.5 |" in card.text


def test_a_new_card_begins_with_its_metadata_and_writing_again_replaces_the_results(tmp_path, caplog):
    readme, first = tmp_path / "model/README.md", write_run(tmp_path / "a")
    readme.parent.mkdir()
    texts = [update_card(readme, [first]).read_text() for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("---\nmodel-index:")
    assert texts[0].count("\n---\n") == 1 and "\n# model\n" in texts[0] and not caplog.records
    text = update_card(readme, [write_run(tmp_path / "c", value=0.7)]).read_text()
    assert "0.859" not in text and "0.7" in text and text.count("## Evaluation") == 1


def test_names_are_no_html_and_no_cells(tmp_path):
    readme = tmp_path / "<img src=x onerror=alert(1)>" / "README.md"
    readme.parent.mkdir()
    run = write_run(tmp_path / "a", spec="<b>[pope](http://x)|`y`", judge="two\nlines\x1b[31m<!-- -->")
    text = update_card(readme, [run]).read_text()
    body = (
        text.split("\n---\n", 1)[1]
        .replace("<!-- vlm-sft-rl eval: begin -->", "")
        .replace("<!-- vlm-sft-rl eval: end -->", "")
    )
    assert "<" not in body and "\x1b" not in body
    assert "# &lt;img src=x onerror=alert(1)&gt;" in body
    assert (
        r"| &lt;b&gt;\[pope\](http://x)\|\`y\` |" in body
        and r"judged by two lines \[31m&lt;!-- --&gt; |" in body
    )


def test_unfinished_runs_and_broken_cards_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no summary\.json"):
        update_card(tmp_path / "README.md", [tmp_path])
    run = write_run(tmp_path / "a")
    for metadata in ("- a", "a: [", "a: b: c", "\t- x", "\x00"):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(UserError, match=r"README\.md: its metadata"):
            update_card(tmp_path / "README.md", [run])


def test_a_card_says_how_many_answers_were_verified(tmp_path):
    run = write_run(tmp_path / "a")
    summary = json.loads((run / "summary.json").read_text())
    verdicts = {"verified": 8900, "not_verified": 80, "nothing_to_verify": 20}
    (run / "summary.json").write_text(json.dumps(summary | {"verdicts": verdicts}))
    text = update_card(tmp_path / "README.md", [run]).read_text()
    assert "answers with every phrase verified 8900 of 9000" in text
    assert "answers with nothing to verify 20 of 9000" in text
