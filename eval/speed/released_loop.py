"""A plain port of the retrospective loop released with REVERSE: the slow side of the decoding benchmark.

One outer loop around `model.generate`: batch 1, every attempt starts from the pixels, runs to the end of the answer,
keeps the logits of every step, and is checked afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.data.tags import VERIFICATION_TOKENS
from vlm_sft_rl.decoding.answers import Grammar, hint_text
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.decoding.released import TEMPERATURE_STEP


@dataclass
class ReleasedAnswer:
    """Ids of the answer, whether it was verified, the rejected phrases in order, and the work done."""

    ids: list[int]
    ok: bool
    rejected: list[str] = field(default_factory=list)
    tokens_forwarded: int = 0
    forwards: int = 0
    image_encodes: int = 0


def released_loop(
    model,
    processor,
    image,
    question: str,
    config: RetrospectiveConfig,
    grammar: Grammar,
    *,
    logits_processor: Callable[[int], LogitsProcessorList] = lambda prompt_length: LogitsProcessorList(),
    verdict: Callable[[float, list[int]], float] = lambda p, before: p,
) -> ReleasedAnswer:
    """Answer one question.

    Args:
        logits_processor: prompt length -> processors for that pass (lets a benchmark force the tokens).
        verdict: (measured P(</UN>), ids before the close tag) -> the value to judge by.
    """
    answer = ReleasedAnswer([], False)
    header, encode = prompting.header_ids(processor), prompting.insertion_encoder(processor)
    text = prompting.render(processor, question, 1)
    accepted, phrases, correcting = [], [], False
    failures, temperature = 0, config.temperature
    for _ in range(config.total_attempts):
        if not correcting:
            temperature = config.temperature
        inputs = processor(
            images=image,
            text=text,
            return_tensors="pt",
            add_special_tokens=not prompting.starts_with_bos(processor.tokenizer, text),
        )
        prompt = inputs["input_ids"][0].tolist()
        if phrases and config.rewrite_query:
            cut = len(prompt) - len(header)
            prompt = prompt[:cut] + encode(hint_text(phrases)) + prompt[cut:]
        ids = torch.tensor([prompt + accepted], device=model.device)
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
            max_new_tokens=1024,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=logits_processor(len(prompt)),
            **sampling,
        )
        new = out.sequences[0, ids.shape[1] :].tolist()
        doubts = torch.cat(out.logits).float().softmax(-1)[:, grammar.unconfident].tolist()
        answer.tokens_forwarded += ids.shape[1] + len(new) - 1
        answer.forwards += len(new)
        answer.image_encodes += 1
        if correcting:
            close = next((i for i, t in enumerate(new) if t in grammar.closes), None)
            if close is not None:
                new = [*new[: close + 1], min(grammar.ends)]
        phrase, keep = _first_bad_phrase(accepted, new, doubts, config.threshold, grammar, verdict)
        if phrase is None:
            if not correcting:
                answer.ids, answer.ok = accepted + [t for t in new if t not in grammar.ends], True
                return answer
            accepted, correcting, failures = accepted + new[:-1], False, 0
            continue
        answer.rejected.append(phrase)
        correcting = True
        failures += 1
        temperature = min(temperature + TEMPERATURE_STEP, config.temperature + config.temperature_span)
        if phrase.lower() not in phrases:
            phrases.append(phrase.lower())
        if failures == config.local_attempts:
            dots = [i for i, t in enumerate(accepted) if grammar.piece(t) == "."]
            junk = accepted[dots[-1] + 1 :] if dots else accepted
            accepted = accepted[: len(accepted) - len(junk)]
            start = new[: next((i for i, t in enumerate(new) if t == grammar.open), len(new))]
            removed = grammar.decode(junk) if accepted or junk else grammar.decode(start).lower()
            for tag in VERIFICATION_TOKENS if accepted or junk else ():
                removed = removed.replace(tag, "")
            if removed := removed.strip():
                phrases.append(removed)
            failures = 0
            continue
        accepted = accepted + new[:keep]
    answer.ids = accepted
    return answer


def _first_bad_phrase(accepted, new, doubts, threshold, grammar, verdict) -> tuple[str | None, int]:
    everything = accepted + new
    opens = [i for i, t in enumerate(everything) if t == grammar.open]
    closes = [i for i, t in enumerate(everything) if t in grammar.closes]
    if not opens:
        return None, 0
    if len(opens) != len(closes) or any(b < a for a, b in zip(opens, closes, strict=True)):
        return "Format Error", 0
    keep = 0
    new_opens = [i for i, t in enumerate(new) if t == grammar.open]
    new_closes = [i for i, t in enumerate(new) if t in grammar.closes]
    for a, b in zip(new_opens, new_closes, strict=False):
        if verdict(doubts[b], everything[: len(accepted) + b]) > threshold:
            return grammar.phrase(new[a + 1 : b]), keep
        keep = b + 1
    return None, 0
