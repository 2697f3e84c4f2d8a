import pytest
from worlds import SPEC, read_rows, write_checkpoint, write_questions, write_world

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.candidates import candidate_settings, choose, scored
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.evaluation.specs import load_spec
from vlm_sft_rl.graders.grade import majority_index
from vlm_sft_rl.runs import read_samples

YES_NO = SPEC.replace("metric: chair", "metric: yes_no").replace(
    "metric_options: {vocabulary: [circle, square]}", "metric_options: {}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tags=False)


@pytest.fixture
def run(tmp_path, checkpoint):
    spec = write_world(tmp_path)
    rows = read_rows(tmp_path / "data/questions.jsonl")
    write_questions(tmp_path, [row | {"answer": "yes"} for row in rows])

    def call(output="out", text=SPEC, **options):
        spec.write_text(text)
        return evaluate_spec(
            spec,
            checkpoint,
            output_dir=tmp_path / output,
            data_dir=tmp_path / "data",
            report=False,
            **options,
        )

    call.folder = tmp_path
    return call


def sample(*texts, answer=None):
    trace = [{"kind": "candidates", "texts": list(texts)}]
    return {
        "id": "a",
        "answer": texts[0] if answer is None else answer,
        "trace": trace,
        "reference": {"answer": "yes"},
    }


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (["a", "b", "b"], 1),
        (["a", "b"], 0),
        (["b", "a", "a", "b"], 0),
        ([None, None, "x"], 2),
        ([None, "x", None, "y", "y"], 3),
        ([None], None),
        ([], None),
    ],
)
def test_the_majority_is_the_first_of_the_most_frequent(keys, chosen):
    assert majority_index(keys) == chosen


@pytest.mark.parametrize(
    ("texts", "answer", "keys"),
    [
        (["no", "Yes, it is.", "yes"], "Yes, it is.", ["no", "yes", "yes"]),
        (["who knows", "no"], "no", [None, "no"]),
        (["who knows", "maybe"], "who knows", [None, None]),
        (
            ["<CAPTION> no </CAPTION>\n\n<CONCLUSION> yes </CONCLUSION>", "no", "yes"],
            "yes",
            ["yes", "no", "yes"],
        ),
        (["<SPAN>no</CN>", "yes", "no"], "no", ["no", "yes", "no"]),
    ],
)
def test_the_vote_reads_candidates_as_they_are_scored(texts, answer, keys):
    found = choose(sample(*texts), {"decoder": "majority"}, load_metric("yes_no", {}))
    assert found["answer"] == answer == found["accepted_answer"]
    assert found["trace"][-1]["kind"] == "vote" and found["trace"][-1]["keys"] == keys


@pytest.mark.parametrize(
    ("selected", "texts", "answer"),
    [
        ("yes", ["no", "no", "yes"], "yes"),  # a candidate says so: the model's choice stands
        ("yes", ["no", "no", "who knows"], "no"),  # no candidate says so
        ("hm", ["no", "yes", "yes"], "yes"),
        ("hm", ["who", "knows"], "hm"),  # nothing to fall back to
    ],
)
def test_the_fallback_is_for_selections_outside_the_candidates(selected, texts, answer):
    settings = {"decoder": "self-select", "candidates": {"fallback": "majority"}}
    found = choose(sample(*texts, answer=selected), settings, load_metric("yes_no", {}))
    assert found["answer"] == answer


def test_a_released_grader_gives_no_answer_away():
    """Its rules credit outputs without an answer with the true one; a vote that read by them would know it."""
    metric = load_metric("answer_accuracy", {"grader": "geoqa", "rules": "released"})
    reference = {"answer": "B", "choices": ["one", "two"]}
    outputs = ["1", "2", "3", "4", "5"]
    assert any(metric.grade(text, reference) for text in outputs)
    assert [metric.read(text, reference) for text in outputs] == [None] * 5
    assert metric.read("Answer: (A)", reference) == "A"


@pytest.mark.parametrize("decoder", ["self-select", "self-refine", "stage-beam", "swires", "opera"])
def test_going_on_gives_what_one_run_gives(run, decoder):
    if decoder == "swires":
        options = {"candidates": {"search": {"rounds": 1, "captions": 2}}, "limit": 3}
    else:
        options = {} if decoder in ("self-refine", "opera") else {"candidates": {"candidates": 2}}
    options["max_new_tokens"] = 6
    whole = run("whole", decoder=decoder, batch_size=6, **options)
    run("parts", decoder=decoder, batch_size=1, **options | {"limit": 2})
    parts = run("parts", decoder=decoder, batch_size=3, **options)
    assert parts["answered_now"] == parts["n"] - 2
    assert read_samples(run.folder / "parts") == read_samples(run.folder / "whole")
    assert parts["metrics"] == whole["metrics"]
    assert whole["cost"]["image_encodes_per_answer"] == 1


def test_the_majority_is_chosen_from_the_texts_in_the_file(run):
    run(text=YES_NO, decoder="majority", candidates={"candidates": 4})
    for line in read_samples(run.folder / "out"):
        texts = line["trace"][0]["texts"]
        vote = line["trace"][-1]
        assert len(texts) == 4 and vote["kind"] == "vote"
        assert line["answer"] == texts[vote["chosen"]].strip()


def test_a_changed_setting_is_refused_and_recorded(run):
    run(decoder="self-select", limit=1)
    with pytest.raises(UserError, match=r"decoding\.candidates\.candidates: 3 -> 4"):
        run(decoder="self-select", limit=1, candidates={"candidates": 4})
    with pytest.raises(UserError, match=r"decoding\.candidates\.temperature: 0\.9 -> 0\.5"):
        run(decoder="self-select", limit=1, temperature=0.5)


def test_the_prompts_of_a_data_set_replace_the_specs(run):
    run(decoder="self-refine", limit=1, candidates={"prompts": "pocket"})
    assert read_samples(run.folder / "out")[0]["prompt"] == "What is it? Think first."


def test_settings_of_a_spec_stand_until_they_are_overridden(run):
    text = SPEC.replace(
        "decoding: {", "decoding: {candidates: {self-select: {candidates: 2, temperature: 0.5}}, "
    )
    summary = run(text=text, decoder="self-select", limit=1, candidates={"candidates": 5})
    assert summary["config"]["candidates"] == {
        "candidates": 5,
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 50,
        "prompts": None,
        "fallback": "none",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "majority"}, "shapes: a majority vote counts equal answers.*self-select"),
        ({"decoder": "self-select", "candidates": {"fallback": "majority"}}, "majority vote"),
        ({"decoder": "self-select", "candidates": {"fallback": "first"}}, "expected one of none, majority"),
        ({"decoder": "greedy", "candidates": {"candidates": 3}}, "no effect on --decoder greedy"),
        ({"decoder": "self-refine", "candidates": {"candidates": 3}}, "`candidates` has no effect"),
        ({"decoder": "self-refine", "temperature": 0.5}, "`temperature` has no effect"),
        ({"decoder": "self-select", "candidates": {"prompts": "moon"}}, "no prompts for 'moon'"),
        ({"decoder": "self-select", "candidates": {"prompts": "pocket/loud"}}, "prompt_style"),
        ({"decoder": "stage-beam", "candidates": {"search": {"rules": "odd"}}}, "rules = .odd., expected"),
        ({"decoder": "stage-beam", "candidates": {"search": {"depth": 2}}}, "SearchConfig"),
        ({"decoder": "stage-beam", "candidates": {"search": {"beams": 2}}}, "beams is the number"),
        ({"decoder": "best-of-n", "candidates": {"candidates": 0}}, ">= 1"),
        ({"decoder": "best-of-n", "temperature": 0}, "above 0"),
        ({"decoder": "opera", "temperature": 0.5}, "--temperature has no effect on --decoder opera"),
        ({"decoder": "opera", "opera": {"depth": 1}}, "OperaConfig"),
        ({"decoder": "vcd", "opera": {"beams": 1}}, "settings of OPERA have no effect"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(run, options, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        run(**options)
    assert not (run.folder / "out").exists()


def test_specs_are_checked_when_they_are_read(tmp_path):
    for wrong, message in (
        ("{greedy: {candidates: 2}}", "draws no candidates"),
        ("{self-refine: {candidates: 2}}", "no effect"),
        ("[self-refine]", "must be a map"),
    ):
        path = tmp_path / "spec.yaml"
        path.write_text(SPEC.replace("decoding: {", f"decoding: {{candidates: {wrong}, "))
        with pytest.raises(UserError, match=message):
            load_spec(path)


def test_published_defaults():
    assert candidate_settings("stage-beam")["candidates"] == 2
    assert candidate_settings("stage-beam", {"candidates": 4}, {"temperature": 1.0}) == {
        "candidates": 4,
        "temperature": 1.0,
        "top_p": 0.9,
        "search": None,
    }


def test_the_page_of_a_run_leads_to_the_candidates(run, checkpoint):
    run("drawn", text=YES_NO, decoder="majority", limit=2, max_new_tokens=3)
    folder = run.folder
    evaluate_spec(
        folder / "spec.yaml",
        checkpoint,
        decoder="majority",
        limit=2,
        max_new_tokens=3,
        output_dir=folder / "drawn",
        data_dir=folder / "data",
    )
    assert 'href="traces/1.html"' in (folder / "drawn/report.html").read_text()
    assert "answers read for the vote" in (folder / "drawn/traces/1.html").read_text()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<CAPTION> x </CAPTION>\n\n<CONCLUSION> <SPAN>2</CN> </CONCLUSION>", "2"),
        (" <SPAN>a dog</UN> ", "a dog"),
    ],
)
def test_candidates_are_scored_without_tags_and_by_their_conclusion(text, read):
    assert scored(text) == read
