"""Metrics, each a subclass of `evaluate.Metric` over pure functions; found by the name an eval spec gives."""

import inspect
from importlib import import_module
from pathlib import Path

from ...errors import UserError, first_line, short

# name in a spec -> module and class
_HOME = {
    "amber_discriminative": "yes_no.AmberDiscriminative",
    "amber_generative": "amber.AmberGenerative",
    "answer_accuracy": "answers.AnswerAccuracy",
    "chair": "chair.Chair",
    "chair_coco": "chair.ChairCoco",
    "cider": "cider.Cider",
    "clair": "judged.Clair",
    "hallusion_bench": "yes_no.HallusionBench",
    "haloquest": "judged.HaloQuest",
    "mm_vet": "judged.MMVet",
    "mme": "yes_no.Mme",
    "mme_hall": "yes_no.MmeHall",
    "mmhal": "judged.MMHal",
    "object_halbench": "object_halbench.ObjectHalBench",
    "rec": "regions.Rec",
    "ref_adv": "regions.RefAdv",
    "reg": "cider.Reg",
    "self_consistency": "regions.SelfConsistency",
    "vqa_accuracy": "answers.VqaAccuracy",
    "yes_no": "yes_no.YesNo",
}
NAMES = tuple(_HOME)


def metric_class(name: str):
    """The class of the metric called `name`. Imports `evaluate` (seconds), which is why it is not done at the top.

    Raises UserError: no such metric.
    """
    if name not in _HOME:
        raise UserError(f"metric {name!r} does not exist. Metrics: {', '.join(NAMES)}.")
    module, attribute = _HOME[name].split(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def load_metric(name: str, options: dict, data_dir: str | Path | None = None):
    """The metric called `name`, built with the spec's `metric_options`.

    Args:
        data_dir: folder that options which are files of the benchmark's owners are relative to.

    Raises UserError: no such metric, an option it does not have, one it cannot do without, or a file that is missing.
    """
    cls = metric_class(name)
    parameters = {
        key: value
        for key, value in inspect.signature(cls.__init__).parameters.items()
        if key != "self" and value.kind is not inspect.Parameter.VAR_KEYWORD
    }
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise UserError(
            f"metric_options of {name!r}: unknown key {unknown[0]!r}. It has: {', '.join(sorted(parameters)) or 'none'}."
        )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            hint = " (nouns, or noun: [synonyms])" if key == "vocabulary" else ""
            raise UserError(f"metric_options of {name!r}: {key!r} is missing{hint}.")
    values = dict(options)
    for key in cls.file_options & set(options):
        if options[key] is None:
            continue
        if not isinstance(options[key], str):
            raise UserError(
                f"metric_options of {name!r}: {key!r} must be the path of a file, found {short(options[key])}."
            )
        values[key] = Path(data_dir or ".", options[key])
        if not values[key].is_file():
            raise UserError(
                f"{values[key]}: no such file; metric_options of {name!r} name it as {key!r}. Fetch it from the "
                "benchmark's owners, or give its folder with --data-dir."
            )
    try:
        return cls(**values)
    except UserError as error:
        files = [str(value) for value in values.values() if isinstance(value, Path)]
        place = ", ".join(files) or f"metric_options of {name!r}"
        if any(word in str(error) for word in (*files, "metric_options")):
            raise
        raise UserError(f"{place}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:  # each option in its own way
        raise UserError(
            f"metric_options of {name!r}: a value of the wrong kind ({first_line(error)}); they are {short(options, 300)}."
        ) from error
