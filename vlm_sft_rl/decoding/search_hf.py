"""Test-time search on a transformers model: `generate_searched`, and `generate_by` for searches of one's own."""

import random
from collections.abc import Callable

from ..data.tags import strip_tags
from ..errors import UserError
from .hf import check_lists
from .policy import HFPolicy, Scorer
from .records import Answer, Counts
from .search import SEARCHES, Found, Search, SearchConfig, run_searches


def generate_searched(
    model,
    processor,
    images: list,
    prompts: list[str],
    search: str = "stage_beam",
    config: SearchConfig | None = None,
    *,
    scorer: Scorer | None = None,
    temperature: float = 0.6,
    top_p: float | None = 0.9,
    max_new_tokens: int = 2048,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Answer `prompts` about `images` by a search of `SEARCHES`; the sampling defaults are LLaVA-CoT's.

    Returns:
        answers with the cost of everything drawn and judged in their counts. The trace has the text of every candidate
        and reply (`Found.steps`), and ends with the event `{"kind": "search", "name", "drawn", "asked", "scored"}`.

    Raises:
        UserError: no such search, or as `sample_many`.
    """
    if search not in SEARCHES:
        raise UserError(f"There is no search {search!r}. Searches: {', '.join(SEARCHES)}.")
    config = config or SearchConfig()

    def make(prompt: str, name: str) -> Search:
        return SEARCHES[search](prompt, config, random.Random(f"{config.seed}/{name}/{search}"))

    return generate_by(
        model,
        processor,
        images,
        prompts,
        search,
        make,
        scorer=scorer,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=config.seed,
        ids=ids,
        batch_size=batch_size,
    )


def generate_by(
    model,
    processor,
    images: list,
    prompts: list[str],
    name: str,
    make: Callable[[str, str], Search],
    *,
    temperature: float,
    top_p: float | None,
    top_k: int | None = None,
    max_new_tokens: int,
    seed: int,
    scorer: Scorer | None = None,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """`generate_searched` by any search; `make(prompt, id)` begins it and `name` is what its trace calls it.

    `batch_size` is the number of answers decoded side by side and of questions whose prompts are kept.
    """
    names = check_lists(model, images, prompts, ids, batch_size)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        policy = HFPolicy(
            model,
            processor,
            images[part],
            prompts[part],
            names[part],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
            scorer=scorer,
        )
        found = run_searches(map(make, prompts[part], names[part]), policy)
        parts = zip(found, policy.counts, names[part], prompts[part], strict=True)
        answers += [_answer(name, *each) for each in parts]
    return answers


def _answer(search: str, found: Found, counts: Counts, name: str, prompt: str) -> Answer:
    text = strip_tags(found.text).strip()
    event = {
        "kind": "search",
        "name": search,
        "drawn": found.drawn,
        "asked": found.asked,
        "scored": found.scored,
    }
    return Answer(text, found.text, True, text, text, [], [*found.steps, event], counts, prompt, name)
