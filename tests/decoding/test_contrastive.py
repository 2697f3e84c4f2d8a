import families
import pytest
import torch
from decoded import longer, prompt_inputs, suppressed
from PIL import Image

from vlm_sft_rl.decoding import (
    DoLaConfig,
    SamplingConfig,
    VCDConfig,
    generate_dola,
    generate_plain,
    generate_vcd,
)
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.contrastive import candidate_layers, contrast_layers, contrast_pictures, noised
from vlm_sft_rl.decoding.sampling import row_rng
from vlm_sft_rl.errors import UserError

PICTURES = [Image.new("RGB", (56, 56), (200, 30, 90)), Image.new("RGB", (56, 84), (10, 200, 90)), None]
PROMPTS = ["What is it?", "Describe the picture.", "Say something."]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "idefics3"])
def family(request):
    return getattr(families, request.param)()


@torch.inference_mode()
def slow(model, processor, branches, contrast, length):
    """Every step from the beginning, without a cache, with one pass for each branch."""
    grammar = build_grammar(model, processor, required=False)
    never, prompt, tokens = suppressed(model, processor), branches[0]["input_ids"][0].tolist(), []
    while len(tokens) < length:
        options = {"use_cache": False, "output_hidden_states": True}
        outputs = [model(**longer(inputs, prompt + tokens), **options) for inputs in branches]
        scores = contrast(*outputs)
        scores[never] = float("-inf")
        token = int(scores.argmax())
        if token in grammar.ends:
            break
        tokens.append(token)
    return grammar.decode(tokens)


def test_vcd_equals_two_separate_passes_without_a_cache(family):
    config = VCDConfig(noise_step=900, max_new_tokens=8, seed=3)
    answers = generate_vcd(*family, PICTURES[:2], PROMPTS[:2], config, ids=["a", "b"])
    for answer, picture, prompt in zip(answers, PICTURES, PROMPTS, strict=False):
        clean = prompt_inputs(*family, prompt, picture)
        generator = torch.Generator().manual_seed(row_rng(3, answer.id).getrandbits(63))
        pixels = noised(clean["pixel_values"].float(), 900, generator).to(clean["pixel_values"])

        def contrast(a, b):
            return contrast_pictures(a.logits[0, -1].float(), b.logits[0, -1].float(), 1.0, 0.1)

        assert answer.tagged_text == slow(*family, [clean, {**clean, "pixel_values": pixels}], contrast, 8)
        assert answer.counts.image_encodes == 2 and answer.counts.tokens_kept <= 8


def test_without_contrast_both_are_greedy(family):
    plain, *others = (
        [answer.tagged_text for answer in generate(*family, PICTURES, PROMPTS, config)]
        for generate, config in (
            (generate_plain, SamplingConfig(max_new_tokens=8)),
            (generate_vcd, VCDConfig(alpha=0.0, max_new_tokens=8)),
            # a token must be about as likely as the likeliest to be kept: only that one is
            (generate_vcd, VCDConfig(beta=1.0, max_new_tokens=8)),
            (generate_dola, DoLaConfig(beta=1.0, max_new_tokens=8)),
        )
    )
    assert others == [plain] * 3


def test_an_answer_depends_on_its_id_and_seed_not_on_its_neighbours(family):
    config = VCDConfig(noise_step=999, alpha=3.0, max_new_tokens=10)
    both = generate_vcd(*family, PICTURES[:2], PROMPTS[:2], config, ids=["a", "b"])
    alone = generate_vcd(*family, PICTURES[1:2], PROMPTS[1:2], config, ids=["b"])
    assert both[1].tagged_text == alone[0].tagged_text


def test_dola_equals_hidden_states_of_full_passes(family):
    head = family[0].get_output_embeddings()
    config = DoLaConfig(layers=[0, 1], beta=0.05, max_new_tokens=6)
    (answer,) = generate_dola(*family, PICTURES[:1], PROMPTS[:1], config)

    def contrast(output):
        earlier = torch.stack([head(output.hidden_states[k][0, -1]).float() for k in (0, 1)])
        return contrast_layers(output.logits[0, -1].float(), earlier, 0.05)

    inputs = prompt_inputs(*family, PROMPTS[0], PICTURES[0])
    assert answer.tagged_text == slow(*family, [inputs], contrast, 6)


def test_contrast_by_hand():
    clean, noisy = torch.tensor([2.0, 1.9, -5.0]), torch.tensor([3.0, 0.0, -50.0])
    # 2 * clean - noisy = [1, 3.8, 40], but the third token is below a tenth of the likeliest
    assert contrast_pictures(clean, noisy, 1.0, 0.1).tolist() == [1.0, pytest.approx(3.8), float("-inf")]


def test_dola_contrasts_with_the_layer_that_differs_most():
    last, far = torch.tensor([1.0, 0.9, 0.0]), torch.tensor([5.0, -5.0, 0.0])
    earlier = torch.stack([last + 0.01, far])
    expected = last.log_softmax(-1) - far.log_softmax(-1)
    assert torch.allclose(contrast_layers(last, earlier, 1e-6), expected)
    assert contrast_layers(last, earlier, 0.1).argmax() == 1


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


@pytest.mark.parametrize("options", [{"beta": 2.0}, {"layers": [99]}, {"layers": "middle"}])
def test_layers_that_are_not_there_are_refused(family, options):
    with pytest.raises(UserError, match="DoLa"):
        generate_dola(*family, [None], ["x"], DoLaConfig(**options))
