"""From a spec, a checkpoint and what the user asks for to the settings of a decoder: what `run.json` records."""

from pathlib import Path

from ..errors import UserError
from .baselines import MODES
from .candidates import REFLECTING, SEARCHING
from .decoders import correction_settings, opera_settings, retrospective_settings, searching_settings
from .specs import EvalSpec


def decoder_settings(
    spec: EvalSpec,
    folder: Path,
    decoder: str,
    seed: int,
    tau: float | None,
    max_new_tokens: int | None,
    temperature: float | None,
    retrospective: dict,
    correction: dict,
    candidates: dict,
    opera: dict,
) -> dict:
    """Everything about decoding that an answer depends on.

    Args:
        tau: as `choose_threshold` found it.
        temperature: explicitly asked for, or None.
        retrospective, correction, candidates, opera: further settings of the decoders that read them.

    Raises:
        UserError: a setting that does not exist or has no effect on the decoder, or a value out of range.
    """
    tokens = spec.decoding.max_new_tokens if max_new_tokens is None else max_new_tokens
    settings = {"decoder": decoder, "seed": seed, "max_new_tokens": tokens}
    if decoder == "retrospective":
        common = {"threshold": tau, "max_new_tokens": tokens, "seed": seed}
        if temperature is not None:
            common["temperature"] = temperature
        return settings | {"retrospective": retrospective_settings(spec, folder, retrospective, common)}
    if decoder == "correct":
        common = {"max_new_tokens": tokens, "seed": seed}
        common |= {} if temperature is None else {"temperature": temperature}
        return settings | {"correction": correction_settings(folder, correction, common)}
    if correction:
        raise UserError(f"settings of corrections have no effect on --decoder {decoder}: leave them out.")
    if retrospective:
        raise UserError(
            f"settings of retrospective decoding have no effect on --decoder {decoder}: leave them out."
        )
    if decoder in (*REFLECTING, *SEARCHING):
        heat = {} if temperature is None else {"temperature": temperature}
        return settings | {"candidates": searching_settings(spec, decoder, candidates | heat, seed)}
    if candidates:
        raise UserError(
            f"settings of candidates ({', '.join(candidates)}) have no effect on --decoder {decoder}; they belong to "
            f"{', '.join((*REFLECTING, *SEARCHING))}."
        )
    if opera and decoder != "opera":
        raise UserError(f"settings of OPERA have no effect on --decoder {decoder}: leave them out.")
    if decoder == "sample":
        heat = spec.decoding.sample_temperature if temperature is None else temperature
        if heat <= 0:
            raise UserError(f"--temperature must be above 0 for --decoder sample, found {heat}.")
        return settings | {"temperature": heat}
    if temperature:
        raise UserError(
            f"--temperature has no effect on --decoder {decoder}; it belongs to --decoder sample, retrospective, "
            "correct, and to those that draw candidates."
        )
    if decoder == "opera":
        return settings | {"opera": opera_settings(opera)}
    return settings | {"temperature": 0.0} | ({"threshold": tau} if decoder in MODES else {})
