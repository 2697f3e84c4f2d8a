import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.config import DoLaConfig, SamplingConfig, VCDConfig
from vlm_sft_rl.decoding.contrastive import (
    candidate_layers,
    contrast_layers,
    contrast_pictures,
    generate_dola,
    generate_vcd,
    noised,
)
from vlm_sft_rl.decoding.generate import encode_batch, generate_plain
from vlm_sft_rl.errors import UserError

FAMILIES = ["llava", "qwen2_5_vl", "idefics3"]
PICTURES = [Image.new("RGB", (56, 56), (200, 30, 90)), Image.new("RGB", (56, 84), (10, 200, 90)), None]
PROMPTS = ["What is it?", "Describe the picture.", "Say something."]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = getattr(families, request.param)()
    return model.eval(), processor


def slow_vcd(model, processor, picture, prompt, name, alpha, beta, step, seed, length):
    """Every step from the beginning, without a cache, with one pass for each branch."""
    from vlm_sft_rl.decoding.sampling import row_rng

    text = prompting.render(processor, prompt, 1)
    clean = encode_batch(model, processor, [text], [[picture]])
    generator = torch.Generator().manual_seed(row_rng(seed, name).getrandbits(63))
    noisy = dict(
        clean, pixel_values=noised(clean["pixel_values"].float(), step, generator).to(clean["pixel_values"])
    )
    return slow(
        model,
        processor,
        [clean, noisy],
        lambda a, b: contrast_pictures(a.logits[0, -1].float(), b.logits[0, -1].float(), alpha, beta),
        length,
    )


@torch.inference_mode()
def slow(model, processor, branches, contrast, length):
    grammar = build_grammar(model, processor, required=False)
    suppressed = prompting.suppressed_ids(model, prompting.get_tokenizer(processor), grammar.ends)
    tokens = []
    while len(tokens) < length:
        outputs = []
        for inputs in branches:
            ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
            extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            if "mm_token_type_ids" in extra:
                zeros = torch.zeros(1, len(tokens), dtype=extra["mm_token_type_ids"].dtype)
                extra["mm_token_type_ids"] = torch.cat([extra["mm_token_type_ids"], zeros], 1)
            extra |= {
                "attention_mask": torch.ones_like(ids),
                "use_cache": False,
                "output_hidden_states": True,
            }
            outputs.append(model(input_ids=ids, **extra))
        scores = contrast(*outputs)
        scores[list(suppressed)] = float("-inf")
        token = int(scores.argmax())
        if token in grammar.ends:
            break
        tokens.append(token)
    return grammar.decode(tokens)


def test_vcd_equals_two_separate_passes_without_a_cache(family):
    model, processor = family
    options = {"alpha": 1.0, "beta": 0.1, "seed": 3}
    answers = generate_vcd(
        model,
        processor,
        PICTURES[:2],
        PROMPTS[:2],
        VCDConfig(noise_step=900, max_new_tokens=8, **options),
        ids=["a", "b"],
    )
    for answer, picture, prompt, name in zip(answers, PICTURES[:2], PROMPTS[:2], "ab", strict=True):
        assert answer.tagged_text == slow_vcd(
            model, processor, picture, prompt, name, step=900, length=8, **options
        )
        assert answer.counts.image_encodes == 2 and answer.counts.tokens_kept <= 8


def test_without_contrast_both_are_greedy(family):
    model, processor = family
    plain = [
        a.tagged_text
        for a in generate_plain(model, processor, PICTURES, PROMPTS, SamplingConfig(max_new_tokens=8))
    ]
    vcd = generate_vcd(model, processor, PICTURES, PROMPTS, VCDConfig(alpha=0.0, max_new_tokens=8))
    assert [a.tagged_text for a in vcd] == plain
    # a token must be about as likely as the likeliest to be kept: only that one is
    for generate, config in ((generate_vcd, VCDConfig), (generate_dola, DoLaConfig)):
        strict = generate(model, processor, PICTURES, PROMPTS, config(beta=1.0, max_new_tokens=8))
        assert [a.tagged_text for a in strict] == plain


def test_an_answer_depends_on_its_id_and_seed_not_on_its_neighbours(family):
    model, processor = family
    config = VCDConfig(noise_step=999, alpha=3.0, max_new_tokens=10)
    both = generate_vcd(model, processor, PICTURES[:2], PROMPTS[:2], config, ids=["a", "b"])
    alone = generate_vcd(model, processor, PICTURES[1:2], PROMPTS[1:2], config, ids=["b"])
    assert both[1].tagged_text == alone[0].tagged_text


def test_dola_equals_hidden_states_of_full_passes(family):
    model, processor = family
    head = model.get_output_embeddings()
    answer = generate_dola(
        model, processor, PICTURES[:1], PROMPTS[:1], DoLaConfig(layers=[0, 1], beta=0.05, max_new_tokens=6)
    )[0]
    inputs = encode_batch(model, processor, [prompting.render(processor, PROMPTS[0], 1)], [PICTURES[:1]])

    def contrast(output):
        earlier = torch.stack([head(output.hidden_states[k][0, -1]).float() for k in (0, 1)])
        return contrast_layers(output.logits[0, -1].float(), earlier, 0.05)

    assert answer.tagged_text == slow(model, processor, [inputs], contrast, 6)


def test_contrast_by_hand():
    clean, noisy = torch.tensor([2.0, 1.9, -5.0]), torch.tensor([3.0, 0.0, -50.0])
    # 2 * clean - noisy = [1, 3.8, 40], but the third token is below a tenth of the likeliest
    assert contrast_pictures(clean, noisy, 1.0, 0.1).tolist() == [1.0, pytest.approx(3.8), float("-inf")]


def test_dola_contrasts_with_the_layer_that_differs_most():
    last = torch.tensor([1.0, 0.9, 0.0])
    near, far = last + 0.01, torch.tensor([5.0, -5.0, 0.0])
    expected = last.log_softmax(-1) - far.log_softmax(-1)
    assert torch.allclose(contrast_layers(last, torch.stack([near, far]), 1e-6), expected)
    assert contrast_layers(last, torch.stack([near, far]), 0.1).argmax() == 1


@pytest.mark.parametrize(
    "layers, count, tied, expected",
    [
        ("low", 32, False, list(range(0, 16, 2))),
        ("low", 32, True, list(range(2, 16, 2))),
        ("high", 32, False, list(range(16, 32, 2))),
        ("high", 60, False, list(range(40, 60, 2))),
        ("low", 60, False, list(range(0, 20, 2))),
        ([1, 3], 4, False, [1, 3]),
    ],
)
def test_candidate_layers_are_those_of_transformers(layers, count, tied, expected):
    assert candidate_layers(layers, count, tied) == expected


def test_noise_keeps_the_variance():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 64, 64)
    for step in (0, 500, 999):
        assert noised(pixels, step, generator).var() == pytest.approx(1.0, abs=0.02)
    assert torch.allclose(noised(pixels, 0, generator), pixels, atol=0.05)


def test_settings_out_of_range_are_refused(family):
    model, processor = family
    for options in ({"alpha": -1.0}, {"beta": 0.0}, {"noise_step": 1000}):
        with pytest.raises(UserError, match="VCD"):
            VCDConfig(**options)
    for options in ({"beta": 2.0}, {"layers": [99]}, {"layers": "middle"}):
        with pytest.raises(UserError, match="DoLa"):
            generate_dola(model, processor, [None], ["x"], DoLaConfig(**options))
