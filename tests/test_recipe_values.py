"""Whatever stands in a YAML file or in a field of a config: settings, or one message that names the place."""

import dataclasses
import math
import random
import typing

import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.recipes import METHODS, parse_yaml, read_yaml
from vlm_sft_rl.settings import check_values
from vlm_sft_rl.train import LIMITS, config_classes, parse, valid_keys

LAUGHS = "\n".join(
    [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)),
    ]
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nmax_steps: 2024-13-45", "line 2, column 12.*'2024-13-45' is no timestamp"),
        ("a: 1\nseed: !!int abc", "line 2, column 7.*'abc' is no int"),
        ("seed: !!float x", "'x' is no float"),
        ("seed: !!bool maybe", "'maybe' is no bool"),
        ("seed: !!int ''", "is no int"),
        ("seed: !!timestamp now", "is no timestamp"),
        (f"seed: {'9' * 5000}", "is no int"),
        ("a: !!binary aGk=", "`a` is .*bytes"),
        ("a: !!set {b}", "`a` is .*set"),
        ("day: 2024-01-02", "`day` is 2024-01-02 .date"),
        ("a: !!python/object/apply:os.getcwd []", "line 1"),
        ("a: 1\na: 2", "line 2.*given twice"),
        ("a: {b: 1, b: 2}", "given twice"),
        ("1: a", "the key 1 is no text"),
        ("a: {yes: 1}", "the key True is no text"),
        ("? [a]\n: b", "line 1"),
        ("? {a: b}\n: b", "line 1"),
        (LAUGHS, "more than 100,000 values"),
        ("a: &a [*a]", "line 1|more than 100,000 values"),
        ("a: &a {b: *a}", "line 1|more than 100,000 values"),
        ("a: &a {b: 1}\nc: {<<: *a}", "line 2"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "line"),
        ("a: *b", "line 1"),
        ("a: b\n--- \nc: d", "line 2"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_of_ours_is_one_message(tmp_path, text, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"(?s)recipe\.yaml.*{complaint}"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1.5e3", ".5e1", "2e6", "1.e2"])
def test_numbers_are_numbers(text):
    assert parse_yaml(f"a: {text}\nb: {{c: [{text}]}}", "x") == {"a": float(text), "b": {"c": [float(text)]}}
    assert parse_yaml(f"a: '{text}'", "x") == {"a": text}


CLASSES = {cls for method in METHODS for cls in config_classes(method)}
FIELDS = sorted({(cls.__name__, field.name) for cls in CLASSES for field in dataclasses.fields(cls)})
# of each kind of YAML value one that nobody means
STRANGE = {
    "nested": {"a": {"b": [{"c": 1}]}},
    "lists": [[[1]]],
    "maps": [{"a": 1}],
    "nan": math.nan,
    "infinite": -math.inf,
    "huge": 10**400,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_value_of_any_field_names_it(kind):
    """Taken are maps and lists where the field's type has them, and nothing else."""
    value, taken = STRANGE[kind], set()
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            try:
                check_values(cls, {field.name: value}, "recipe.yaml", LIMITS)
                taken.add((field.name, str(typing.get_type_hints(cls)[field.name])))
            except UserError as error:
                assert str(error).startswith(f"recipe.yaml: `{field.name}` is "), error
                assert ", expected " in str(error)
    assert len(FIELDS) > 700
    open_kinds = {"nested": "dict", "lists": "list[Any]", "maps": "list"}
    assert all(kind in open_kinds and open_kinds[kind] in hint for _, hint in taken), taken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", [1e-5]),
        ("learning_rate", math.nan),
        ("learning_rate", -1e-5),
        ("learning_rate", True),
        ("use_cpu", "maybe"),
        ("gradient_checkpointing", 3),
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", 2.5),
        ("gradient_accumulation_steps", -1),
        ("gradient_accumulation_steps", True),
        ("max_steps", None),
        ("max_steps", "ten"),
        ("num_train_epochs", "nan"),
        ("warmup_steps", {"a": 1}),
        ("save_steps", [2]),
        ("seed", 10**30),
        ("lora_r", 0),
        ("lora_dropout", 1.5),
        ("lora_target_modules", [1]),
        ("optim", "sgdd"),
        ("save_strategy", False),
        ("lr_scheduler_type", ["cosine"]),
        ("train_file", 7),
        ("subsample", -3),
        ("on_bad_row", "ignore"),
        ("report_to", 5),
        ("hint_probability", math.inf),
    ],
)
def test_a_wrong_value_in_a_recipe_names_its_key(tmp_path, name, value):
    recipe = {"method": "reverse", "output_dir": str(tmp_path), "use_cpu": True, name: value}
    with pytest.raises(UserError, match=rf"recipe\.yaml.*{name}"):
        parse(recipe, [], "recipe.yaml")


def test_no_value_of_any_field_is_a_traceback(tmp_path):
    rng = random.Random(5)
    values = [
        *STRANGE.values(),
        None,
        True,
        -5,
        0,
        3,
        0.5,
        "text",
        "",
        "nan",
        [],
        [1],
        ["a"],
        {},
        {"a": 1},
        math.inf,
    ]
    refused = 0
    for _ in range(60):
        method = rng.choice(METHODS)
        recipe = {"method": method, "output_dir": str(tmp_path), "use_cpu": True}
        recipe[rng.choice(sorted(valid_keys(method)))] = rng.choice(values)
        try:
            parse(recipe, [], "recipe.yaml")
        except UserError as error:
            refused += 1
            assert "recipe.yaml" in str(error)
    assert refused > 20


def test_one_text_is_a_list_of_one_text(tmp_path):
    recipe = {"method": "grpo", "output_dir": str(tmp_path), "use_cpu": True, "rewards": "format"}
    assert parse(recipe, [], "recipe.yaml")[-1].rewards == ["format"]
