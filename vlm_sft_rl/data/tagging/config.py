"""Settings of tagging. Nothing heavy here: the command line's options are made from them."""

from dataclasses import dataclass
from pathlib import Path

from ...endpoint import EndpointSettings, completions_url
from ...errors import UserError
from ...settings import Checked, setting

KINDS = ("yes_no", "choice", "count", "colour", "attribute", "relation", "object")  # of negatives by rule
CHECK_QUESTION = "Is there {phrase} in the image? Answer yes or no."


@dataclass(frozen=True)
class TagConfig(EndpointSettings):
    """Settings of `pipeline.tag`; each is an option of `vlm-sft-rl data tag`."""

    nouns: str | Path | None = setting(
        None, "Text file of nouns, one a line: tag these instead of the noun phrases that spaCy finds."
    )
    spacy_model: str | None = setting(
        None, "spaCy pipeline that finds noun phrases. Default: en_core_web_sm."
    )
    objects: str | Path | None = setting(
        None,
        "Ground truth (JSONL) of what is in each image: image and objects, or region rows with category.",
    )
    kinds: str = setting(",".join(KINDS), "Kinds of negatives that are made by rule, with commas.")
    negatives: int = setting(1, "Most negative rows made from one row.", least=1)
    places: bool = setting(
        True, "Include a preposition of place before a phrase ('on the table') in its tag."
    )
    processes: int = setting(1, "Processes that find noun phrases.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn at random.")
    checker: str | None = setting(
        None, "Checkpoint directory or endpoint that is asked of each phrase whether it is in the image."
    )
    checker_model: str | None = setting(None, "Name of the checker model at its endpoint.")
    check_question: str = setting(
        CHECK_QUESTION,
        "Question to the checker; {phrase} is filled in.",
        holds="{phrase}",
    )
    teacher: str | None = setting(None, "Address of an OpenAI-compatible endpoint that writes negatives.")
    teacher_model: str | None = setting(None, "Name of the teacher model at its endpoint.")
    teacher_images: bool = setting(True, "Send the images to the teacher, too.")
    image_root: str | Path | None = setting(
        None, "Folder that image paths start from. Default: the folder of SOURCE."
    )

    def __post_init__(self):
        """Raises UserError: settings that do not exist, are out of range or do not go together."""
        super().__post_init__()
        if unknown := set(self.kind_list) - set(KINDS):
            raise UserError(
                f"Unknown kinds of negatives: {', '.join(sorted(unknown))}. Known are {', '.join(KINDS)}."
            )
        if (self.teacher is None) != (self.teacher_model is None):
            raise UserError(
                "--teacher and --teacher-model go together: an address, and the model's name there."
            )
        if self.checker is not None and "://" in self.checker and self.checker_model is None:
            raise UserError("--checker with an address needs --checker-model, the model's name there.")
        for address in (self.teacher, self.checker):
            if address is not None and (address is self.teacher or "://" in address):
                completions_url(address)  # refused before any work

    @property
    def kind_list(self) -> list[str]:
        return [kind.strip() for kind in self.kinds.split(",") if kind.strip()]


@dataclass(frozen=True)
class PairConfig(Checked):
    """Settings of `pairs.write_pairs`; each is an option of `vlm-sft-rl data pairs`."""

    judge: str = setting(
        "verifier",
        "Who decides what is preferred: the verdicts of the traces, or ground truth (`--objects`).",
        choices=("verifier", "truth"),
    )
    level: str = setting(
        "phrase",
        "What is compared: two phrases tried at one place of an answer (traces); of several answers to one question, two "
        "sentences behind the same text, the rejected one the first wrong one of its answer (SENTINEL), or two whole "
        "answers (CHAIR-DPO). The last two need ground truth.",
        choices=("phrase", "sentence", "answer"),
    )
    places: str = setting(
        "all",
        "Of the places of an answer where something was rejected: all, or the first.",
        choices=("all", "first"),
    )
    tries: str = setting(
        "all",
        "Of the phrases rejected at one place: all, or the first, which is what the model says by itself.",
        choices=("all", "first"),
    )
    chosen: str = setting(
        "answer",
        "How far the chosen side goes behind its phrase: to the end of the answer, of the sentence, or of the phrase.",
        choices=("answer", "sentence", "phrase"),
    )
    ends: bool = setting(
        True,
        "Pairs, too, where nothing was accepted in place of what was rejected: the answer ended. They teach to end in place "
        "of repeating, and may teach to say less, as nobody has verified that nothing is left.",
    )
    repeats: bool = setting(
        True, "Phrases that were rejected because the answer had them already lose, too (weight 1)."
    )
    weights: str = setting(
        "difference",
        "`pair_weight`: the difference of P(</UN>), of whole answers that of the share of wrong mentions; or 1.",
        choices=("difference", "none"),
    )
    objects: str | Path | None = setting(
        None, "Ground truth, JSONL of image and objects. [`reference.objects` of the answers]"
    )
    vocabulary: str | Path | None = setting(
        None, "Nouns that mentions are found by, one a line. [those of the ground truth]"
    )

    def __post_init__(self):
        """Raises UserError: a value out of range, or without effect beside the others."""
        super().__post_init__()
        by_truth, phrases = self.judge == "truth", self.level == "phrase"
        self.require(
            by_truth or phrases, "level", "phrase with `judge: verifier`, whose verdicts are on phrases"
        )
        for name in ("objects", "vocabulary"):
            self.require(by_truth or getattr(self, name) is None, name, "nothing with `judge: verifier`")
        if not phrases:
            for name, default in (
                ("places", "all"),
                ("tries", "all"),
                ("chosen", "answer"),
                ("repeats", True),
                ("ends", True),
            ):
                self.require(getattr(self, name) == default, name, f"{default} with `level: {self.level}`")
