import random

import families
import pytest
import torch
from decoded import generated, longer, pictures, prompt_inputs

from vlm_sft_rl.data import chat
from vlm_sft_rl.decoding.branches import ImageBranches, check_branching
from vlm_sft_rl.decoding.sampling import GREEDY, Sampling

FAMILIES = ["llava", "qwen2_5_vl", "qwen2_vl", "llava_next", "idefics3", "llava_mistral"]
QUESTIONS = ["What is it?", "Describe the thing at the left."]


def branched(family: str, count: int = 2, questions=QUESTIONS):
    model, processor = getattr(families, family)()
    rendered = [chat.render(processor, question, 1) for question in questions[:count]]
    return model, processor, lambda: ImageBranches(model, processor, pictures(count), rendered)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_that_share_an_image_get_the_answers_they_get_alone(family):
    model, processor, branch = branched(family)
    branches, images = branch(), pictures(2)
    first = branches.ask([[tail] for tail in branches.tails], [[GREEDY]] * 2, 6)
    asked = zip(QUESTIONS, images, strict=True)
    assert first == [[generated(model, processor, question, image, 6)] for question, image in asked]
    others = [["Where is the cat?", "Is it a dog or a bird, and why?"], ["Where?"]]
    tails = [[chat.tail_ids(processor, chat.render(processor, q, 1)) for q in own] for own in others]
    answers = branches.ask(tails, [[GREEDY, GREEDY], [GREEDY]], 5)
    for image, questions, own in zip(images, others, answers, strict=True):
        assert own == [generated(model, processor, question, image, 5) for question in questions]
    assert branches.image_encodes == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_mistral"])
def test_ragged_questions_under_autocast_are_those_of_float32_but_for_rounding(family):
    model, _, branch = branched(family)
    scores = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            check_branching(model)
            branches = branch()
            tails = [[branches.tails[0], branches.tails[0][1:]], [branches.tails[1]]]
            branches.ask(tails, [[GREEDY, GREEDY], [GREEDY]], 4)
            nested = branches.score(tails, [[[70, 71, 72], [80]], [[81, 82]]])
            scores.append(torch.cat([score for own in nested for score in own]))
    torch.testing.assert_close(*scores, atol=0.05, rtol=0.05)
    assert not torch.equal(*scores)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_scores_are_the_log_probabilities_of_a_full_pass(family):
    model, processor, branch = branched(family, 1)
    branches, answers, early = branch(), [[70, 71, 72, 73], [80]], 2
    scores = branches.score([[branches.tails[0]] * 2], [answers], early)[0]
    ends, never = sorted(branches.ends), sorted(branches.sampler.suppress)
    assert ends and never
    inputs = prompt_inputs(model, processor, QUESTIONS[0], pictures(1)[0])
    for answer, score in zip(answers, scores, strict=True):
        whole = longer(inputs, inputs["input_ids"][0].tolist() + answer)
        with torch.no_grad():
            logits = model(**whole).logits[0, -len(answer) - 1 : -1].float()
        # what cannot be said has no share
        logits[:, never] = float("-inf")
        logits[:early, ends] = float("-inf")
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        torch.testing.assert_close(score, expected, atol=2e-5, rtol=1e-4)
    # scoring leaves the rows as they were
    again = branches.score([[branches.tails[0]]], [[answers[0]]], early)[0][0]
    torch.testing.assert_close(again, scores[0], atol=2e-5, rtol=1e-4)


def test_samples_depend_on_their_own_stream_only():
    model, processor, _ = branched("llava")
    rendered, images = chat.render(processor, QUESTIONS[0], 1), pictures(3)

    def sample(rows):
        branches = ImageBranches(model, processor, [images[row] for row in rows], [rendered] * len(rows))
        draws = [[Sampling(1.0, random.Random(2 * row + k)) for k in range(2)] for row in rows]
        return branches.ask([[tail] * 2 for tail in branches.tails], draws, 8)

    together = sample([0, 1, 2])
    assert [together[2]] == sample([2])
    assert together[0][0] != together[0][1]


def test_min_new_tokens_holds_the_end_back():
    _, processor, branch = branched("llava", 1)
    end, branches = processor.tokenizer.eos_token_id, branch()
    branches.sampler.choose = lambda logits, rows: [
        end if row[end] > -1e30 else int(row.argmax()) for row in logits
    ]
    assert branches.ask([[branches.tails[0]]], [[GREEDY]], 9, min_new_tokens=4)[0][0].index(end) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_save_passes_and_change_no_answer(family):
    _, _, branch = branched(family)

    def ask(guesses, temperature=0.0):
        branches = branch()
        tails = [[tail] * 2 for tail in branches.tails]
        draws = [[Sampling(temperature, random.Random(i)), GREEDY] for i in range(2)]
        answers = branches.ask(tails, draws, 6, min_new_tokens=2, guesses=guesses)
        # a later question finds the rows as it would have
        return (answers, branches.ask(tails, [[GREEDY, GREEDY]] * 2, 3)), branches.forwards

    plain, passes = ask(None)
    right = plain[0]
    wrong = [[[*answer[:3], answer[3] + 1, *answer[4:]] for answer in own] for own in right]
    mixed = [[right[0][0], []], [wrong[1][0], [*right[1][1], 70, 71]]]
    for guesses, most in ((right, passes - 5), (wrong, passes - 3), (mixed, passes)):
        answers, count = ask(guesses)
        assert answers == plain and count <= most
    # samples take no guesses
    assert ask(right, temperature=1.0)[0] == ask(None, temperature=1.0)[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_pass_that_reads_guesses_scores_them(family):
    branches = branched(family)[2]()
    tails, draws = [[tail] * 2 for tail in branches.tails], [[GREEDY] * 2] * 2
    end = next(iter(branches.ends))
    # as long as an answer may be, ended, ended within, begun
    guesses = [[[70, 71, 72, 73, 74, 75], [80, 81, end]], [[90, end, 91], [92]]]
    branches.ask(tails, draws, 6, min_new_tokens=1, guesses=guesses, judge=True)
    judged, forwards = branches.guessed, branches.forwards
    for own, expected in zip(judged, branches.score(tails, guesses, 1), strict=True):
        for pair in zip(own, expected, strict=True):
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
    assert branches.forwards == forwards + 1
    branches.ask(tails, draws, 6, guesses=guesses)
    assert not branches.guessed


@pytest.mark.parametrize("guessing", [False, True])
def test_a_guess_ends_where_the_answer_does(guessing):
    _, processor, branch = branched("llava", 1)
    branches, end = branch(), processor.tokenizer.eos_token_id
    tokens = iter([70, 71, end, 72, 73, 74])
    branches.sampler.choose = lambda logits, rows: [next(tokens) for _ in rows]
    guesses = [[[70, 71, end, 72, 73]]] if guessing else None
    assert branches.ask([[branches.tails[0]]], [[GREEDY]], 9, guesses=guesses) == [[[70, 71, end]]]
