from types import SimpleNamespace

import pytest
import torch
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
    assert set(probe.measure(torch.nn.Linear(1, 1))) == {"verifier_p_right"}


def test_refusals(tmp_path):
    spec = write_world(tmp_path)
    with pytest.raises(UserError, match="probe_every"):
        VerifierProbe(print, print, str(spec), tmp_path / "data", every=0)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        VerifierProbe(print, print, str(spec), tmp_path / "data", questions="nowhere.jsonl")
    probe = VerifierProbe(print, print, str(spec), tmp_path / "data")
    with pytest.raises(UserError, match="FSDP"):
        probe.on_train_begin(SimpleNamespace(deepspeed=None, fsdp=["full_shard"]), None, None)
