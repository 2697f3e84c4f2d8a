"""The transformers model inside a PEFT wrapper."""


def unwrap(model):
    """`model` itself, or what its PEFT wrapper holds."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
