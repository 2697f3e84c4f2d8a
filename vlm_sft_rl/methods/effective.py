"""The settings of a run as its checkpoints remember them."""

import dataclasses


def effective_recipe(recipe: dict, *configs) -> dict:
    """The recipe's keys with the values that are in force, plus every other setting that is not its default."""
    found = {"method": recipe["method"]}
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default is not dataclasses.MISSING else None
            simple = isinstance(value, str | int | float | bool | list | dict | type(None))
            if simple and field.init and (field.name in recipe or _overridden(field, value, default)):
                found[field.name] = value
    return found


# transformers fills these in by itself
_FILLED_IN = {"logging_dir", "run_name", "dataset_kwargs", "bf16", "fp16", "accelerator_config", "hub_token"}


def _overridden(field, value, default) -> bool:
    return (
        field.default_factory is dataclasses.MISSING
        and field.name not in _FILLED_IN
        and type(value) is type(default)
        and value != default
    )
