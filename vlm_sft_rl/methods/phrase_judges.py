"""Who says whether a phrase of a sampled answer is true: the row's ground truth, or a model that is asked."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from ..data.tagging.phrases import YES_NO, Phrase, all_present, names_thing
from ..data.tagging.verdicts import Checker, EndpointChecker, ModelChecker, Scene, nouns_of, read_vocabulary
from ..errors import UserError, short
from ..rewards.verdicts import Judge
from ..teacher import EndpointClient

logger = logging.getLogger(__name__)
LEDGER = "checker.jsonl"  # answers of an endpoint, in the output folder


def truth_judge(nouns: Collection[str]) -> Judge:
    """Ground truth: a leading yes or no is held against a row's `answer` where that is one, every other phrase against its
    `objects`: all nouns of the phrase must be among them. A phrase without a noun of the vocabulary is not judged."""

    def verdict(phrase: str, row: dict) -> bool | None:
        if (right := is_right_word(phrase, row)) is not None:
            return right
        present = row.get("objects")
        return None if present is None else all_present(phrase, nouns, present)

    return lambda claims: [verdict(phrase, row) for phrase, row in claims]


def is_right_word(phrase: str, row: dict) -> bool | None:
    """Whether a leading yes or no is the row's `answer`; None where one of them is neither."""
    said, right = YES_NO.match(phrase), YES_NO.match(row.get("answer") or "")
    return said[1].lower() == right[1].lower() if said and right else None


def checker_judge(checker: Checker) -> Judge:
    """A model is asked of every phrase that names a thing whether it is there, once for each picture; again where it gave no
    verdict, as when a request failed. A leading yes or no is held against the row's `answer`; nothing else is judged."""
    known: dict[tuple, bool] = {}

    def judge(claims: Sequence[tuple[str, dict]]) -> list[bool | None]:
        keys = [(*row["images"], phrase.lower()) for phrase, row in claims]
        new = {
            key: (phrase, row)
            for key, (phrase, row) in zip(keys, claims, strict=True)
            if key not in known and row["images"] and names_thing(phrase)
        }
        verdicts = checker.verdicts(
            [(row["images"], Phrase(0, len(phrase), phrase)) for phrase, row in new.values()]
        )
        pairs = zip(new, verdicts, strict=True)
        known.update({key: verdict for key, verdict in pairs if verdict is not None})
        if new and not known:
            logger.warning(
                "`checker` (%s): no reply to %d questions begins with yes or no, the first about %s: nothing is judged.",
                checker.name,
                len(new),
                short(next(iter(new.values()))[0]),
            )
        words = [is_right_word(phrase, row) for phrase, row in claims]
        return [known.get(key) if word is None else word for key, word in zip(keys, words, strict=True)]

    return judge


def load_judge(args, nouns: Collection[str], image_root: Path) -> Judge:
    """The judge of a recipe's settings.

    Raises UserError: `checker` is no checkpoint, or `check_question` has no {phrase}.
    """
    if args.checker is None:
        return truth_judge(nouns)
    if "://" not in args.checker:
        return checker_judge(ModelChecker(args.checker, args.check_question, image_root))
    ledger = Path(args.output_dir) / f"{args.process_index}-{LEDGER}"
    client = EndpointClient(args.checker, args.checker_model, ledger=ledger)
    return checker_judge(EndpointChecker(client, args.check_question, image_root))


def truth_nouns(args, rows: Sequence[dict]) -> list[str]:
    """The nouns that phrases are found by.

    Raises UserError: a row has no truth that the settings ask for, or there is no noun at all.
    """
    needs_objects = "objects" in args.rewards
    for row in rows:
        if row.get("objects") is not None:
            row["objects"] = nouns_of(row["objects"], f"question {row['id']!r}")
        elif needs_objects or (args.checker is None and not YES_NO.match(row.get("answer") or "")):
            raise UserError(
                f"question {row['id']!r}: no `objects`, the list of what is in its picture, which "
                f"{'the reward `objects`' if needs_objects else 'judging its phrases'} needs (found "
                f"{short(sorted(row))}). Add it, or name a `checker`{' and another reward' * needs_objects}."
            )
    scenes = [Scene(row["objects"]) for row in rows if row.get("objects") is not None]
    nouns = read_vocabulary(args.nouns, scenes) if args.nouns or scenes else []
    named = {noun for scene in scenes for noun in scene.objects}
    if unknown := sorted(named.difference(nouns)):
        logger.warning(
            "`nouns` (%s) lacks %d of %d objects of the rows, such as %s: answers that name them get no credit.",
            args.nouns,
            len(unknown),
            len(named),
            ", ".join(unknown[:3]),
        )
    return nouns
