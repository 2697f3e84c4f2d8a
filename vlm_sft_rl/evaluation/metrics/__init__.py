"""Metrics, each a subclass of `evaluate.Metric` over pure functions; found by the name an eval spec gives."""

from ...errors import UserError

NAMES = ("chair", "yes_no")


def load_metric(name: str, options: dict):
    """The metric called `name`, built with the spec's `metric_options`.

    Imports `evaluate` (seconds), which is why it is not done at the top.

    Raises:
        UserError: no such metric, or an option it does not have.
    """
    from .chair import Chair
    from .yes_no import YesNo

    metrics = {"chair": Chair, "yes_no": YesNo}
    if name not in metrics:
        raise UserError(f"metric {name!r} does not exist. Metrics: {', '.join(NAMES)}.")
    known = {"chair": {"vocabulary", "ignore"}, "yes_no": {"compat"}}[name]
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(
            f"metric_options of {name!r}: unknown key {unknown[0]!r}. It has: {', '.join(sorted(known))}."
        )
    if name == "chair" and "vocabulary" not in options:
        raise UserError("metric_options of 'chair': 'vocabulary' is missing (nouns, or noun: [synonyms]).")
    return metrics[name](**options)
