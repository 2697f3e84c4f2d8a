"""What `SCTuneTrainer` makes of its settings, what it evaluates, and what a checkpoint remembers."""

import families
import pytest
from regions import config, opened, region_rows, trainer

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.regions import region_settings
from vlm_sft_rl.evaluation.specs import load_spec
from vlm_sft_rl.io import write_jsonl
from vlm_sft_rl.methods.sc_tune import load_held_out
from vlm_sft_rl.models.parts import part_of
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar
from vlm_sft_rl.rewards.regions import iou
from vlm_sft_rl.trainers.sc_tune.trainer import SCTuneTrainer

ROWS = region_rows(2)


def test_evaluation_is_one_row_after_the_other_by_hand(tmp_path):
    rows, loose = region_rows(5, seed=5, expressions=True), region_rows(3, seed=6)
    made = trainer(tmp_path, eval_dataset={"a": rows, "b": loose}, per_device_eval_batch_size=2)
    corner = (0.0, 0.0, 30.0, 30.0)
    # a random model's boxes cannot be read: what is decoded stands for one
    made.prompts.located = lambda ids, row: corner if sum(ids) % 3 else None
    found = made.evaluate()
    assert not any("rec" in name for name in found if name.startswith("eval_b"))
    with made.decoding(made.model) as plain:
        by_hand = []
        for row in opened(made, rows):
            (rollout,) = made.rollouts.captions(plain, [row], None, locate=True, expressions=True)
            (caption,) = rollout.samples
            boxes = [rollout.boxes[text] for text in (caption.text, *row["expressions"])]
            overlaps = [iou(box, row["box"]) for box in boxes]
            by_hand.append([*overlaps, boxes[0] is not None, len(caption.ids)])
    iou_said, iou_expression, parsed, length = (sum(column) / 5 for column in zip(*by_hand, strict=True))
    assert found["eval_a_iou"] == pytest.approx(iou_said, abs=1e-6)
    assert found["eval_a_acc50"] == pytest.approx(sum(one[0] >= 0.5 for one in by_hand) / 5, abs=1e-6)
    assert found["eval_a_rec_acc50"] == pytest.approx(sum(one[1] >= 0.5 for one in by_hand) / 5, abs=1e-6)
    assert found["eval_a_parse_rate"] == pytest.approx(parsed, abs=1e-6)
    assert found["eval_a_length"] == pytest.approx(length, abs=1e-6)
    assert iou_said > 0 and iou_expression > 0, "boxes that are never hit would measure nothing"


def test_a_model_by_its_path_is_trained_without_its_tower_and_remembers_how_it_was_asked(tmp_path):
    model, processor = families.llava()
    model.save_pretrained(tmp_path / "model"), processor.save_pretrained(tmp_path / "model")
    prompts = {"describe_prompt": "What, at {box}?", "locate_prompt": "Where, {description}?"}
    settings = config(tmp_path / "run", max_steps=1, box_convention="llava-pad", **prompts)
    made = SCTuneTrainer(str(tmp_path / "model"), settings, train_dataset=region_rows(8))
    trained = {part_of(name) for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained == {"projector", "language"}
    made.train()
    made.save_model()
    spec = load_spec("self_consistency").regions
    found = region_settings(spec, tmp_path / "run")
    assert found["box_convention"] == "llava-pad"
    assert {name: found[name] for name in prompts} == prompts


def test_a_describers_own_decoding_is_checked_before_the_first_step(tmp_path):
    model, processor = families.with_tags(families.llava())
    families.save(model, processor, tmp_path / "model")
    write_sidecar(tmp_path / "model", Sidecar(decoding={"local_attempt": 3}))
    settings = config(tmp_path / "run", describer="retrospective")
    with pytest.raises(UserError, match=r"decoding.*local_attempt"):
        SCTuneTrainer(str(tmp_path / "model"), settings, train_dataset=ROWS)
    write_sidecar(
        tmp_path / "model", Sidecar(threshold=0.2, decoding={"local_attempts": 3, "temperature": 9.0})
    )
    made = SCTuneTrainer(str(tmp_path / "model"), settings, train_dataset=ROWS)
    used = made.rollouts.retrospective_config(0.5)
    assert (used.threshold, used.local_attempts, used.temperature) == (0.2, 3, 0.5)


def test_a_limit_that_cuts_the_rows_own_boxes_is_warned_of(tmp_path, caplog):
    trainer(tmp_path / "short", locate_max_new_tokens=5)
    assert "cut off" in caplog.text and "'llava'" in caplog.text
    caplog.clear()
    trainer(tmp_path / "enough", locate_max_new_tokens=40)
    assert "cut off" not in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"baseline": "group"}, "at least 2"),
        ({"without_replacement": True}, "needs `num_generations` of at least 2"),
        (
            {"without_replacement": True, "num_generations": 2, "describer": "retrospective"},
            "the law of plain descriptions alone",
        ),
        ({"describer_steps": 0, "locator_steps": 0}, "one of the phases must have steps"),
        ({"baseline": "critic"}, "`baseline` is 'critic', expected greedy"),
        ({"describe_prompt": "What is it?"}, "must contain {box}"),
        ({"rewards": ["clip"]}, "'clip' is unknown"),
        ({"rewards": ["iou", "length"], "reward_weights": [1.0]}, "1 weights for 2 rewards"),
        ({"top_k": 0}, "`top_k` is 0, expected an integer >= 1, or null"),
        ({"top_p": 0.0}, "expected a number > 0 and <= 1, or null"),
        ({"describer": "verified"}, "`describer` is 'verified', expected plain"),
        ({"rollout_batch_size": -1}, "expected an integer >= 1, or null"),
        ({"max_ratio": 0.5}, "expected a number > 1"),
        ({"early_stop": 0.0}, "expected a number > 0"),
        ({"temperature": float("nan")}, "expected a number > 0"),
        ({"kl_coef": float("nan")}, "expected a number >= 0"),
        ({"kl_anchor": "start", "kl_coef": 0.0}, "`kl_coef` above 0"),
        ({"locate_max_new_tokens": 0}, "expected an integer >= 1"),
        ({"verification_threshold": 0.1}, "only with `describer: retrospective`"),
        ({"verification_threshold": 0.0, "describer": "retrospective"}, "expected a number > 0 and < 1"),
        ({"min_caption_iou": 0.5, "locator_steps": 0}, "0 without locator steps"),
        ({"rec_file": "rec.jsonl", "locator_steps": 0}, "0 without locator steps"),
        ({"use_vllm": True}, "`use_vllm` = True: must be false.*vLLM gives no keys.*Leave it out"),
        ({"optimizers": (None, object())}, "cannot be scaled by phase"),
        ({"box_convention": "polar"}, "'polar' is unknown"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_dataset": ROWS},
            "cannot be scaled by phase",
        ),
    ],
)
def test_bad_settings_are_refused_with_the_cure(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings).train()


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    model, processor = families.llava()
    settings = config(tmp_path)
    with pytest.raises(UserError, match="nothing is trained"):
        SCTuneTrainer(model.requires_grad_(False), settings, train_dataset=ROWS, processing_class=processor)


def test_the_figure_that_chooses_the_best_model_must_be_one_that_is_measured(tmp_path):
    rows = [row | {"image": "x.png"} for row in region_rows(2, expressions=True)]
    write_jsonl(tmp_path / "with.jsonl", rows)
    write_jsonl(
        tmp_path / "without.jsonl", [{k: v for k, v in row.items() if k != "expressions"} for row in rows]
    )
    for name, metric, fine in (
        ("with", "eval_rec_acc50", True),
        ("without", "rec_acc50", False),
        ("without", "eval_iou", True),
        ("with", "accuracy", False),
    ):
        args = config(tmp_path, metric_for_best_model=metric)
        if fine:
            assert len(load_held_out(str(tmp_path / f"{name}.jsonl"), args)) == 2
            continue
        with pytest.raises(UserError, match=rf"{metric}.*gives eval_iou"):
            load_held_out(str(tmp_path / f"{name}.jsonl"), args)
