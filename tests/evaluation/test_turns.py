import families
import pytest
import torch

from vlm_sft_rl.decoding import SamplingConfig
from vlm_sft_rl.evaluation.decoders import DECODERS, answer_batch
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.turns import after_turn, first_confidence, turn_summary


def sample(name, reference, *texts, **more):
    trace = [
        {"kind": "turn", "number": i + 1, "text": text, "least_sure": 0.1 * (i + 1)}
        for i, text in enumerate(texts)
    ]
    return {"id": name, "answer": texts[-1], "trace": trace, "reference": {"answer": reference, **more}}


def staged(answer):
    return f"<CAPTION> no dogs </CAPTION>\n\n<CONCLUSION> {answer} </CONCLUSION>"


SAMPLES = [
    sample("a", "yes", staged("no"), staged("yes"), category="x"),
    sample("b", "no", staged("no"), category="y"),
    sample("c", "no", "who knows", staged("No."), category="y"),
]


def test_only_conclusions_are_scored_and_stopped_answers_stay():
    assert [s["answer"] for s in after_turn(SAMPLES, 0)] == ["no", "no", "who knows"]
    assert [s["answer"] for s in after_turn(SAMPLES, 1)] == ["yes", "no", "No."]
    assert first_confidence(SAMPLES) == {"a": 0.1, "b": 0.1, "c": 0.1}


def test_turns_flips_and_groups():
    found = turn_summary(SAMPLES, load_metric("yes_no", {}), rounds=20)
    one, two = found["turns"]
    assert one["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert one["metrics"]["unreadable"]["value"] == pytest.approx(1 / 3)
    assert two["metrics"]["accuracy"]["value"] == 1
    assert two["minus_turn_1"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["flips"][1]["counts"] == {"wrong_to_right": 2, "right_to_wrong": 0}
    assert found["by_category"]["x"]["net_flips"]["value"] == 1
    assert found["by_category"]["y"]["agreement"]["value"] == 0.5
    assert sum(g["n"] for g in found["by_confidence"].values()) == 3


def test_captions_have_turns_but_no_flips():
    captions = [
        {"id": "a", "answer": "", "trace": [{"kind": "turn", "text": t, "least_sure": 1.0} for t in texts],
         "reference": {"objects": ["cat"]}}
        for texts in (["a cat and a dog", "a cat"], ["a dog", "a cat"])
    ]  # fmt: skip
    found = turn_summary(captions, load_metric("chair", {"vocabulary": ["cat", "dog"]}), rounds=20)
    assert [t["metrics"]["chair_i"]["value"] for t in found["turns"]] == [pytest.approx(2 / 3), 0]
    assert "flips" not in found


def test_a_staged_answer_is_handed_on_as_its_conclusion():
    model, processor = families.llava()
    text = staged("yes")
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    config = SamplingConfig(max_new_tokens=len(ids))
    question = (DECODERS["greedy"], config, [None], ["Is it?"], ["a"], 1)
    answer_batch((model, processor), *question)  # the model is tried out in its first call
    written = iter(ids)

    def write(module, args, output):
        output = torch.full_like(output, -10.0)
        output[..., next(written)] = 10.0
        return output

    model.get_output_embeddings().register_forward_hook(write)
    (answer,) = answer_batch((model, processor), *question)
    assert answer["text"] == "yes" and answer["tagged_text"] == text
