import random

import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding.branches import ImageBranches, check_branching
from vlm_sft_rl.decoding.sampling import GREEDY, Sampling
from vlm_sft_rl.errors import UserError

FAMILIES = ["llava", "qwen2_5_vl", "qwen2_vl", "llava_next", "idefics3", "llava_mistral"]


def pictures(count: int) -> list[Image.Image]:
    rng = random.Random(0)
    return [
        Image.new("RGB", (40 + 9 * i, 56), tuple(rng.randrange(256) for _ in range(3))) for i in range(count)
    ]


def reference(model, processor, image, question: str, limit: int) -> list[int]:
    """The same answer from `generate`, one row, nothing shared."""
    text = prompting.render(processor, question, 1)
    tokenizer = prompting.get_tokenizer(processor)
    special = not prompting.starts_with_bos(tokenizer, text)
    inputs = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special)
    suppress = sorted(prompting.suppressed_ids(model, tokenizer, prompting.end_ids(model, tokenizer)))
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, suppress_tokens=suppress)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_that_share_an_image_get_the_answers_they_get_alone(family):
    model, processor = getattr(families, family)()
    images = pictures(2)
    first = ["What is it?", "Describe the thing at the left."]
    branches = ImageBranches(model, processor, images, [prompting.render(processor, q, 1) for q in first])
    own = branches.ask([[t] for t in branches.tails], [[GREEDY]] * 2, 6)
    assert [row[0] for row in own] == [
        reference(model, processor, image, q, 6) for image, q in zip(images, first, strict=True)
    ]
    others = [["Where is the cat?", "Is it a dog or a bird, and why?"], ["Where?"]]
    tails = [[prompting.tail_ids(processor, prompting.render(processor, q, 1)) for q in qs] for qs in others]
    said = branches.ask(tails, [[GREEDY, GREEDY], [GREEDY]], 5)
    for image, questions, answers in zip(images, others, said, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            assert answer == reference(model, processor, image, question, 5)
    assert branches.image_encodes == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_mistral"])
def test_ragged_questions_under_autocast_are_those_of_float32_but_for_rounding(family):
    model, processor = getattr(families, family)()
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            check_branching(model)
            texts = [prompting.render(processor, q, 1) for q in ("What is it?", "Describe the thing.")]
            branches = ImageBranches(model, processor, pictures(2), texts)
            tails = [[branches.tails[0], branches.tails[0][1:]], [branches.tails[1]]]
            branches.ask(tails, [[GREEDY, GREEDY], [GREEDY]], 4)
            scores = branches.score(tails, [[[70, 71, 72], [80]], [[81, 82]]])
            found.append(torch.cat([one for own in scores for one in own]))
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0.05)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_scores_are_the_log_probabilities_of_a_full_pass(family):
    model, processor = getattr(families, family)()
    image = pictures(1)[0]
    text = prompting.render(processor, "What is it?", 1)
    branches = ImageBranches(model, processor, [image], [text])
    answers, early = [[70, 71, 72, 73], [80]], 2
    scores = branches.score([[branches.tails[0]] * 2], [answers], early)[0]
    ends, never = sorted(branches.ends), sorted(branches.sampler.suppress)
    assert ends and never
    special = not prompting.starts_with_bos(processor.tokenizer, text)
    inputs = dict(processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special))
    for answer, score in zip(answers, scores, strict=True):
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        full = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
        if "mm_token_type_ids" in full:
            extra = torch.zeros(1, len(answer), dtype=torch.long)
            full["mm_token_type_ids"] = torch.cat([full["mm_token_type_ids"], extra], 1)
        with torch.no_grad():
            logits = model(**full).logits[0, -len(answer) - 1 : -1].float()
        # what cannot be said has no share
        logits[:, never] = float("-inf")
        logits[:early, ends] = float("-inf")
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        torch.testing.assert_close(score, wanted, atol=2e-5, rtol=1e-4)
    # scoring leaves the rows as they were
    again = branches.score([[branches.tails[0]]], [[answers[0]]], early)[0][0]
    torch.testing.assert_close(again, scores[0], atol=2e-5, rtol=1e-4)


def test_samples_depend_on_their_own_stream_only():
    model, processor = families.llava()
    images = pictures(3)
    prompts = [prompting.render(processor, "What is it?", 1)] * 3

    def sample(rows, seeds):
        branches = ImageBranches(model, processor, [images[r] for r in rows], [prompts[r] for r in rows])
        draws = [[Sampling(1.0, random.Random(s)) for s in seeds[r]] for r in rows]
        return branches.ask(
            [[t] * len(seeds[r]) for t, r in zip(branches.tails, rows, strict=True)], draws, 8
        )

    seeds = [[1, 2], [3, 4], [5, 6]]
    together = sample([0, 1, 2], seeds)
    assert [together[2]] == sample([2], seeds)
    assert together[0][0] != together[0][1]


def test_min_new_tokens_holds_the_end_back():
    model, processor = families.llava()
    end = processor.tokenizer.eos_token_id
    branches = ImageBranches(model, processor, pictures(1), [prompting.render(processor, "What is it?", 1)])
    branches.sampler.choose = lambda logits, rows: [
        end if logits[i, end] > -1e30 else int(logits[i].argmax()) for i in range(len(logits))
    ]
    assert branches.ask([[branches.tails[0]]], [[GREEDY]], 9, min_new_tokens=4)[0][0].index(end) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_save_passes_and_change_no_answer(family):
    model, processor = getattr(families, family)()
    prompts = [prompting.render(processor, q, 1) for q in ("What is it?", "Describe the thing at the left.")]

    def ask(guesses, limit=6, draws=None):
        branches = ImageBranches(model, processor, pictures(2), prompts)
        tails = [[tail] * 2 for tail in branches.tails]
        draws = draws or [[GREEDY, GREEDY]] * 2
        said = branches.ask(tails, draws, limit, min_new_tokens=2, guesses=guesses)
        # a later question finds the rows as it would have
        return said, branches.ask(tails, [[GREEDY, GREEDY]] * 2, 3), branches.forwards

    plain, later, passes = ask(None)
    wrong = [[[*answer[:3], answer[3] + 1, *answer[4:]] for answer in own] for own in plain]
    mixed = [[plain[0][0], []], [wrong[1][0], [*plain[1][1], 70, 71]]]
    for guesses, most in ((plain, passes - 5), (wrong, passes - 3), (mixed, passes)):
        said, then, count = ask(guesses)
        assert (said, then) == (plain, later) and count <= most
    # samples take no guesses
    seeds = [[Sampling(1.0, random.Random(i)), GREEDY] for i in range(2)]
    sampled, _, _ = ask(None, draws=seeds)
    seeds = [[Sampling(1.0, random.Random(i)), GREEDY] for i in range(2)]
    assert ask(plain, draws=seeds)[0] == sampled


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_pass_that_reads_guesses_scores_them(family):
    model, processor = getattr(families, family)()
    prompts = [prompting.render(processor, q, 1) for q in ("What is it?", "Describe the thing at the left.")]
    branches = ImageBranches(model, processor, pictures(2), prompts)
    tails = [[tail] * 2 for tail in branches.tails]
    end = next(iter(branches.ends))
    # as long as an answer may be, ended, ended within, begun
    guesses = [[[70, 71, 72, 73, 74, 75], [80, 81, end]], [[90, end, 91], [92]]]
    branches.ask(tails, [[GREEDY] * 2] * 2, 6, min_new_tokens=1, guesses=guesses, judge=True)
    found, forwards = branches.guessed, branches.forwards
    for own, wanted in zip(found, branches.score(tails, guesses, 1), strict=True):
        for one, other in zip(own, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert branches.forwards == forwards + 1
    branches.ask(tails, [[GREEDY] * 2] * 2, 6, guesses=guesses)
    assert not branches.guessed


def test_a_guess_ends_where_the_answer_does():
    model, processor = families.llava()
    end = processor.tokenizer.eos_token_id
    prompt = prompting.render(processor, "What is it?", 1)
    found = []
    for guess in (None, [[[70, 71, end, 72, 73]]]):
        branches = ImageBranches(model, processor, pictures(1), [prompt])
        wanted = iter([70, 71, end, 72, 73, 74])
        branches.sampler.choose = lambda logits, rows, wanted=wanted: [next(wanted) for _ in rows]
        found.append(branches.ask([[branches.tails[0]]], [[GREEDY]], 9, guesses=guess)[0][0])
    assert found == [[70, 71, end]] * 2


def test_a_model_that_cannot_rewind_is_refused_with_the_reason():
    model, _ = families.paligemma()
    with pytest.raises(UserError, match="both directions"):
        check_branching(model)
