"""A model folder with any file or value broken works or is refused with one message; nothing hangs."""

import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import vlm_sft_rl
from vlm_sft_rl.data.model_files import check_model_files, template_fault
from vlm_sft_rl.decoding import SamplingConfig, generate_plain
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import load_for_inference

POCKET = Path(vlm_sft_rl.__file__).parent / "pocket" / "base"
SETTINGS = ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"]
CONTENTS = ["", "{", "[]", "7", "null", '[{"a": 1}]', "[" * 3000, "\ufeff", "\0" * 99]
ABSENT = object()


def copy_of_pocket(folder: Path) -> Path:
    return Path(shutil.copytree(POCKET, folder))


def answers(folder: Path) -> str:
    """One answer of the folder's model, as `vlm-sft-rl generate` makes it."""
    model, processor, _ = load_for_inference(folder, "cpu")
    picture = Image.linear_gradient("L").convert("RGB").resize((150, 100))
    config = SamplingConfig(max_new_tokens=3, temperature=0.0)
    return generate_plain(model, processor, [[picture]], ["What is there?"], config)[0].text


def verdict(folder: Path) -> str | None:
    """None where the model answers, else the message; any other error is the test's."""
    begin = time.process_time()
    try:
        answers(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        assert time.process_time() - begin < 20
    return None


@pytest.mark.parametrize("name", [*SETTINGS, "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_file_of_other_content_is_named(tmp_path, name):
    folder = copy_of_pocket(tmp_path / "model")
    for content in CONTENTS:
        (folder / name).write_text(content)
        message = verdict(folder)
        assert message and (name.partition(".")[0].replace("_", " ") in message.replace("_", " ")), (
            content,
            message,
        )
    (folder / name).unlink()
    message = verdict(folder)
    assert (message is None) == (name == "generation_config.json"), message


VALUES = {
    "config.json": {
        "model_type": (7, [], "nothing"),
        "text_config": ([], "x", 7, {}, ABSENT),
        "text_config.hidden_size": (-1, 0, "32", 10**12, 7, ABSENT),
        "text_config.num_hidden_layers": (-1, 0, 10**9, 1, True, [2]),
        "text_config.vocab_size": (-5, 10**12, "many", 3),
        "text_config.num_attention_heads": (0, 7, 5.5),
        "text_config.hidden_act": (7, "none of them"),
        "text_config.tie_word_embeddings": ("no",),
        "vision_config.image_size": (-1, 0, 10**9, "big", 64),
        "vision_config.patch_size": (-1, 0, 10**9, 16),
        "image_token_index": (-200, 10**9, "x", 5, ABSENT),
        "vision_feature_layer": (99, "x"),
    },
    "generation_config.json": {"eos_token_id": (-1, 10**7, "x", ["a"], [10**7]), "temperature": ("x",)},
    "processor_config.json": {
        "patch_size": (-1, 0, "x", 16, ABSENT, None),
        "num_additional_image_tokens": (-1, 10**12, 7),
        "image_token": (7, "nowhere"),
        "processor_class": (7, "None", "Qwen2VLProcessor"),
        "image_processor": ([], {}, 7),
        "image_processor.size": (-1, 0, 10**9, {"shortest_edge": -1}, {"height": 10**9, "width": 1}, []),
        "image_processor.crop_size": (-1, 10**9, {"height": 64, "width": 64}),
        "image_processor.image_mean": ([], "x", [float("nan")] * 3),
        "image_processor.image_std": ([0, 0, 0], [1e-40] * 3, 0),
        "image_processor.rescale_factor": (0, -1, "x", float("inf")),
        "image_processor.do_resize": ("false", 7),
        "image_processor.resample": (99, "x"),
    },
    "tokenizer_config.json": {
        "model_max_length": (-1, 0, "x"),
        "chat_template": (7, [7], {"a": 1}),
        "eos_token": (7, [], {}),
        "pad_token": (7,),
        "padding_side": ("up", 7),
        "tokenizer_class": (7,),
        "extra_special_tokens": (7, [7]),
    },
}
CASES = [(name, field) for name, fields in VALUES.items() for field in fields]


@pytest.mark.parametrize("name, field", CASES)
def test_a_value_that_cannot_be_meant_is_refused(tmp_path, name, field):
    folder = copy_of_pocket(tmp_path / "model")
    whole = (folder / name).read_text()
    for value in VALUES[name][field]:
        settings = json.loads(whole)
        *parents, key = field.split(".")
        owner = settings
        for parent in parents:
            owner = owner[parent]
        owner[key] = value
        if value is ABSENT:
            del owner[key]
        (folder / name).write_text(json.dumps(settings))
        message = verdict(folder)
        assert message, value


def test_values_of_published_files_are_taken(tmp_path):
    config = {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "text_config": {
            "vocab_size": 151936,
            "num_hidden_layers": 28,
            "pad_token_id": -1,
            "eos_token_id": [1, 2],
        },
        "vision_config": {
            "depth": 32,
            "patch_size": [14, 14],
            "image_size": [448, 448],
            "num_heads": [3, 6, 12],
        },
        "quantization_config": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    picture = {
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "image_mean": 0.5,
        "rescale_factor": 1 / 255,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(picture))
    tokens = {
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": {"content": "x"},
        "bos_token": None,
    }
    templates = [{"name": "default", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | {"chat_template": templates}))
    check_model_files(tmp_path)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
TEMPLATES = {
    LOOP.replace("BODY", ""): "does not come to an end",
    "{% generation %}" + LOOP.replace("BODY", "") + "{% endgeneration %}": "does not come to an end",
    "{{ 9**(9**(9**9)) }}": "does not come to an end",
    LOOP.replace("BODY", "{{ messages }}"): "writes more than",
    "{{ 'a' * 10**11 }}": "takes all memory",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "takes all memory",
    "{% for message in messages %}{{ message.content | tojson }}{% endfor %}": None,
    "{{ strftime_now('%Y') }}{% generation %}{{ messages }}{% endgeneration %}{% break %}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_without_an_end_is_ended(template):
    fault, expected = template_fault(template), TEMPLATES[template]
    assert fault is None if expected is None else fault.startswith(expected)


@pytest.mark.parametrize(
    "template, reason",
    [
        (LOOP.replace("BODY", ""), "the chat template does not come to an end"),
        ("hello", "leaves out the question"),
        ("{{ raise_exception('not this') }}", r"The chat template fails \(not this\)"),
        ("{% for message in messages %}", "The chat template fails"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "does not take a picture",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, template, reason):
    folder = copy_of_pocket(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=rf"{folder}: .*{reason}"):
        answers(folder)


@pytest.mark.parametrize(
    "content", ["{{ m.content }}", "{{ m.content.strip() }}", "{{ m.content | tojson }}"]
)
def test_a_template_that_takes_text_alone_is_given_text(tmp_path, content):
    folder = copy_of_pocket(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}USER: " + content + "{% endfor %} ASSISTANT:"
    )
    model, processor, _ = load_for_inference(folder, "cpu")
    picture = Image.new("RGB", (40, 40))
    answer = generate_plain(
        model, processor, [[picture]], ["A cat?"], SamplingConfig(max_new_tokens=3, temperature=0.0)
    )
    assert answer[0].counts.image_encodes == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"guidance_scale": 2.0},
        {"num_beams": 4, "diversity_penalty": 1.0, "num_beam_groups": 2},
        {"return_dict_in_generate": True, "output_scores": True},
        {"max_length": 2},
    ],
)
def test_how_the_checkpoint_would_have_decoded_is_not_taken_over(tmp_path, settings):
    folder = copy_of_pocket(tmp_path / "model")
    expected, path = answers(folder), folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert answers(folder) == expected
