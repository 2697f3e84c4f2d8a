from types import SimpleNamespace

import pytest
import torch
from json_lines import read_lines, write_lines
from worlds import answer, write_world

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.probe import VerifierProbe


def test_the_probe_logs_how_own_phrases_are_ranked(tmp_path):
    spec = write_world(tmp_path, count=4)
    logged, seen = [], []

    def generate(model, images, prompts, max_new_tokens):
        seen.append((model.training, len(images), prompts[0], max_new_tokens))
        # circle is right for even pictures; one wrong phrase (0.3) ranks below one right phrase (0.4)
        return [
            answer(("a circle", 0.1), ("a square", 0.9)),
            answer(("a square", 0.4), ("a circle", 0.3)),
            answer(("a circle", 0.2)),
            answer(("a square", 0.2)),
        ]

    probe = VerifierProbe(logged.append, generate, str(spec), tmp_path / "data", every=5)
    model = torch.nn.Linear(1, 1).train()
    args = SimpleNamespace(deepspeed=None, fsdp=None)
    probe.on_train_begin(args, None, None)
    for step in (4, 5, 6):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        probe.on_step_end(args, state, None, model=model)
    assert seen == [(False, 4, "What is it? Be brief.", 12)] and model.training
    # wrong {0.9, 0.3} against right {0.1, 0.4, 0.2, 0.2}: 7 of 8 pairs in order
    assert logged == [
        {
            "verifier_p_wrong": pytest.approx(0.6),
            "verifier_p_right": pytest.approx(0.225),
            "verifier_auc": pytest.approx(7 / 8),
        }
    ]


def test_without_a_wrong_phrase_there_is_no_area(tmp_path):
    spec = write_world(tmp_path, count=2)
    right = [answer(("a circle", 0.1)), answer(("a square", 0.2))]
    probe = VerifierProbe(print, lambda *_: right, str(spec), tmp_path / "data")
    assert set(probe.measure(torch.nn.Linear(1, 1), 1)) == {"verifier_p_right"}


def test_refusals(tmp_path):
    spec = write_world(tmp_path)
    with pytest.raises(UserError, match="probe_every"):
        VerifierProbe(print, print, str(spec), tmp_path / "data", every=0)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        VerifierProbe(print, print, str(spec), tmp_path / "data", questions="nowhere.jsonl")
    probe = VerifierProbe(print, print, str(spec), tmp_path / "data")
    with pytest.raises(UserError, match="FSDP"):
        probe.on_train_begin(SimpleNamespace(deepspeed=None, fsdp=["full_shard"]), None, None)


def test_the_verifiers_fall_at_the_starts_own_phrases_is_logged_and_warned_of(tmp_path, caplog):
    spec = write_world(tmp_path, count=2)
    answers = [answer(("a circle", 0.1), ("a square", 0.9)), answer(("a square", 0.2))]
    readings = [
        [[0.1, 0.9], [0.2]],
        [[0.3, 0.25], [0.2]],
    ]  # the wrong square between the two right phrases at last
    seen, logged = [], []

    def read(model, images, prompts, texts):
        seen.append((model.training, len(images), texts))
        return readings[min(len(seen), 2) - 1]

    options = {"every": 1, "fall": 0.02, "read": read}
    probe = VerifierProbe(logged.append, lambda *_: answers, str(spec), tmp_path / "data", **options)
    args = SimpleNamespace(deepspeed=None, fsdp=None, output_dir=tmp_path, load_best_model_at_end=False)
    model = torch.nn.Linear(1, 1).train()
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    probe.on_train_begin(args, state, None, model=model)
    for state.global_step in (1, 2):
        probe.on_step_end(args, state, None, model=model)
    assert [figures["verifier_auc_at_start"] for figures in logged] == [1.0, 0.5]
    assert seen[0][:2] == (False, 2) and "a square" in seen[0][2][0]
    probe.on_train_end(args, state, None, model=model)
    assert len(seen) == 2  # the last step's reading
    args.load_best_model_at_end = True  # which is another model
    probe.on_train_end(args, state, None, model=model)
    assert len(seen) == 3
    # resumed in another process: the answers of the start are those of the file
    again = VerifierProbe(logged.append, lambda *_: [], str(spec), tmp_path / "data", **options)
    again.on_train_begin(args, state, None, model=model)
    again.on_train_end(args, state, None, model=model)
    assert "1.000 then, 0.500 now" in caplog.text and "fallen by more than `probe_fall`" in caplog.text


@pytest.mark.parametrize("change", [{"limit": 2}, {"questions": "other.jsonl"}, {}])
def test_a_resumed_run_that_asks_other_questions_is_refused(tmp_path, change):
    spec, model = write_world(tmp_path, count=3), torch.nn.Linear(1, 1)
    other = [row | {"question": "Where is it?"} for row in read_lines(tmp_path / "data/questions.jsonl")]
    write_lines(tmp_path / "data/other.jsonl", other)
    answers = [answer(("a circle", 0.1), ("a square", 0.9))] * 3
    args = SimpleNamespace(deepspeed=None, fsdp=None, output_dir=tmp_path)

    def begin(step, **options):
        probe = VerifierProbe(print, lambda *_: answers, str(spec), tmp_path / "data", fall=0.02, **options)
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        probe.on_train_begin(args, state, None, model=model)

    begin(0)
    begin(1)
    if not change:
        (tmp_path / "probe_start.jsonl").write_text('{"id": "q0"}\n')
    message = "3 questions answered before training are not the [23] of this run" if change else "line 1: "
    with pytest.raises(UserError, match=rf"probe_start\.jsonl.*{message}.*Remove the file"):
        begin(1, **change)
