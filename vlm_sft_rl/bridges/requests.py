"""Requests of lmms-eval as our decoders take them, and back."""

from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_TOKENS = 512

# (context, generation settings, doc -> pictures, doc id, task, split)
Request = tuple[str, dict, Callable[[Any], list], Any, str, str]


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    stops = [until] if isinstance(until, str) else [stop for stop in until or () if stop]
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def answer_requests(
    requests: Sequence[Request],
    document: Callable[[str, str, Any], Any],
    answer: Callable[[dict, list, list[str], list[str]], list[str]],
    on_done: Callable[[int], None] = lambda count: None,
    per_call: int = 32,
) -> list[str]:
    """Answer requests in groups of equal settings; the answers come back in the requests' order.

    Args:
        document: (task, split, doc id) -> the document that a picture is taken from.
        answer: (`{"max_new_tokens", "temperature"}`, pictures or None for each, prompts, ids) -> texts.
        on_done: told how many answers were made.
        per_call: requests handed over together.
    """
    groups: dict[tuple, list[int]] = {}
    for index, (_, settings, *_) in enumerate(requests):
        tokens = int(settings.get("max_new_tokens") or DEFAULT_TOKENS)
        # a temperature without sampling means greedy there
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        groups.setdefault((tokens, temperature), []).append(index)
    texts = [""] * len(requests)
    for (tokens, temperature), members in groups.items():
        limits = {"max_new_tokens": tokens, "temperature": temperature}
        for start in range(0, len(members), per_call):
            part = members[start : start + per_call]
            images, prompts, names = [], [], []
            for index in part:
                context, _, visuals, identity, task, split = requests[index]
                images.append(visuals(document(task, split, identity)) or None)
                prompts.append(context.replace("<image>", "").strip())
                names.append(f"{task}/{split}/{identity}")
            answers = answer(limits, images, prompts, names)
            for index, text in zip(part, answers, strict=True):
                texts[index] = cut_at(text, requests[index][1].get("until"))
            on_done(len(part))
    return texts
