import json
from functools import partial

import pytest
import staged_world

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.graders.grade import grade_staged
from vlm_sft_rl.rewards.answers import answer_reward, answer_rewards, format_reward

QUESTION = {"id": "q", "question": "How many?", "answer": "3", "unit": None}
OUTPUTS = [
    staged_world.staged(3),
    staged_world.staged(4),
    "So the answer is 3.",
    "<CONCLUSION> 3",
    "<CONCLUSION> 4 </CONCLUSION> <CONCLUSION> 3.0 </CONCLUSION>",
    "I cannot say what this is, nor anything else.",
    "",
]


def reward_of(staged, outputs=OUTPUTS, **columns):
    grade = partial(grade_staged, load_grader("pocket"), staged=staged)
    return answer_reward(grade)(completions=outputs, row=[json.dumps(QUESTION)] * len(outputs), **columns)


@pytest.mark.parametrize(
    ("staged", "expected"), [(True, [1, 0, 0, 1, 1, 0, 0]), (False, [1, 0, 1, 1, 1, 0, 0])]
)
def test_the_reward_is_the_graders_verdict(staged, expected):
    verdicts = [grade_staged(load_grader("pocket"), text, QUESTION, staged=staged) for text in OUTPUTS]
    assert reward_of(staged) == [float(v.correct) for v in verdicts] == expected


def test_messages_are_read_as_texts_and_what_cannot_be_read_is_logged():
    logged = {}
    said = [[{"role": "assistant", "content": text}] for text in OUTPUTS]
    assert reward_of(True, said, log_metric=logged.__setitem__, prompts=[], trainer_state=None) == reward_of(
        True
    )
    assert logged == {"answers/unreadable": 3 / 7}


def test_the_form_is_rewarded_apart_from_the_answer():
    assert format_reward(completions=OUTPUTS, row=[]) == [1, 1, 0, 0, 0, 0, 0]


def test_rewards_are_named():
    assert answer_rewards(["format"], grade_staged) == [format_reward]
    for names in ([], ["answer", "iou"]):
        with pytest.raises(UserError, match="answer, format, length"):
            answer_rewards(names, grade_staged)
