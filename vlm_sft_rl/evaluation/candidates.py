"""Decoders that draw several answers and keep or write one: their settings, and the vote over what was drawn."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..data.stages import conclusion
from ..data.tags import strip_tags
from ..errors import UserError
from ..graders.grade import majority_index
from ..graders.prompts import Prompts, load_prompts, plain_reflection

if TYPE_CHECKING:
    from .metrics.counting import CountMetric

REFLECTING = ("majority", "self-select", "self-refine")
SEARCHING = ("best-of-n", "sentence-beam", "stage-beam", "swires")
FALLBACKS = ("none", "majority")
# of the settings, those that a decoder reads
_USED = {
    "majority": ("candidates", "temperature", "top_p", "top_k", "prompts"),
    "self-select": ("candidates", "temperature", "top_p", "top_k", "prompts", "fallback"),
    "self-refine": ("prompts",),
    **dict.fromkeys(SEARCHING, ("candidates", "temperature", "top_p", "search")),
}


@dataclass(frozen=True)
class CandidateConfig:
    """Settings of majority, self-select and self-refine (R3V, arXiv 2411.00855; its released sampling), and of searches.

    Attributes:
        candidates: N answers to choose from (for searches at every step).
        temperature, top_p, top_k: of their sampling; null is no limit.
        prompts: None asks as the spec does, and reflects in words that fit any prompt; `DATASET` or `DATASET/STYLE`
            (`load_prompts`) asks for a rationale and reflects as self-training on that data set does.
        fallback: of self-select: `none`, as released, takes what the model says; `majority` takes the most frequent
            candidate where the model says nothing readable or something that no candidate says.
        search: further fields of `SearchConfig`.
    """

    candidates: int = 3
    temperature: float = 0.9
    top_p: float | None = 0.95
    top_k: int | None = 50
    prompts: str | None = None
    fallback: str = "none"
    search: dict[str, Any] | None = None

    def __post_init__(self):
        """Raises UserError: a value out of its range."""
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise UserError(f"`candidates` must be a whole number >= 1, found {self.candidates!r}.")
        if not isinstance(self.temperature, int | float) or self.temperature <= 0:
            raise UserError(f"the temperature of candidates must be above 0, found {self.temperature!r}.")
        if self.fallback not in FALLBACKS:
            raise UserError(f"`fallback` is {self.fallback!r}, expected one of {', '.join(FALLBACKS)}.")
        if self.prompts is not None:
            self.texts()

    def texts(self) -> Prompts:
        """What the model is asked when it looks at answers."""
        return plain_reflection() if self.prompts is None else load_prompts(*self.prompts.split("/", 1))


def candidate_settings(decoder: str, *layers: dict[str, Any]) -> dict:
    """The settings that this decoder reads, later layers over earlier ones.

    Raises:
        UserError: a setting that does not exist or that the decoder does not read, or a value out of range.
    """
    given = {name: value for layer in layers for name, value in layer.items()}
    used = _USED[decoder]
    for name in given:
        if name not in used:
            raise UserError(f"`{name}` has no effect on --decoder {decoder}, which has {', '.join(used)}.")
    # LLaVA-CoT's (arXiv 2411.10440) for its searches, R3V's otherwise
    published = {"candidates": 2, "temperature": 0.6, "top_p": 0.9} if decoder in SEARCHING else {}
    config = asdict(CandidateConfig(**(published | given)))
    return {name: config[name] for name in used}


def check_candidates(decoder: str, settings: Any, where: str) -> None:
    """Raises UserError: the settings of a spec are not those of a decoder here."""
    if decoder not in _USED:
        raise UserError(f"{where}: {decoder!r} draws no candidates. Decoders that do: {', '.join(_USED)}.")
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {decoder!r} must be a map of settings, found {settings!r}.")
    try:
        candidate_settings(decoder, settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def asks_itself(settings: dict) -> Prompts | None:
    """The prompts that replace the spec's, where the settings name a data set."""
    named = settings.get("candidates", {}).get("prompts")
    return CandidateConfig(prompts=named).texts() if named else None


def check_readable(decoder: str, settings: dict, metric: "CountMetric", name: str) -> None:
    """Raises UserError: answers must be counted, but the metric reads none from a text."""
    needed = decoder == "majority" or settings.get("candidates", {}).get("fallback") == "majority"
    if needed and not metric.reads_answers:
        raise UserError(
            f"{name}: a majority vote counts equal answers, and its metric reads none from a text (it judges the whole of "
            "it). Use --decoder self-select or best-of-n, or a spec with short answers."
        )


def candidates_of(trace: Sequence[dict]) -> list[str]:
    """Texts of the candidates in the first draw of a trace."""
    return next((event["texts"] for event in trace if event.get("kind") == "candidates"), [])


def choose(sample: dict, settings: dict, metric: "CountMetric") -> dict:
    """The sample with the answer that the votes decide for, and an event `vote` that says how.

    `majority` takes the first candidate with the most frequent answer, the first of all where none can be read;
    self-select with the fallback does so where the selection is no candidate's answer.
    """
    reference = metric.reference_of(sample["reference"])
    texts = [scored(text) for text in candidates_of(sample["trace"])]
    keys = [metric.read(text, reference) for text in texts]
    index = majority_index(keys)
    vote: dict[str, Any] = {"kind": "vote", "keys": keys}
    if settings["decoder"] == "self-select":
        vote["selected"] = selected = metric.read(sample["answer"], reference)
        if selected is not None and selected in keys:
            index = None
    elif index is None:
        index = 0
    vote["chosen"] = index
    sample = {**sample, "trace": [*sample["trace"], vote]}
    if index is None:
        return sample
    text = texts[index]
    return {
        **sample,
        "answer": text,
        "tagged_answer": candidates_of(sample["trace"])[index],
        "accepted_answer": text,
        "best_effort_answer": text,
    }


def chooser(settings: dict, metric: "CountMetric") -> Callable[[dict], dict] | None:
    """`choose` for decoders whose answer is decided by votes, else None."""
    votes = settings["decoder"] == "majority" or settings.get("candidates", {}).get("fallback") == "majority"
    return (lambda sample: choose(sample, settings, metric)) if votes else None


def scored(text: str) -> str:
    """A model's text as answers are scored: without tags, of staged ones the conclusion."""
    plain = strip_tags(text)
    said = conclusion(plain)
    return plain.strip() if said is None else said
