"""The two builders of tagged rows over ordinary files: captions, answers and ground truth in, training rows out."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from posixpath import normpath

from ..errors import FORMAT, RowError, UserError
from ..io import read_jsonl, read_text, replacing
from .onpolicy import object_grader, on_policy_rows
from .rows import SUPERVISE, read_rows
from .tags import UNCONFIDENT
from .verification import Prior, Scene, synthetic_rows, yes_no_rows

PRIORS = ("company", "theme", "uniform")


def write_synthetic(
    captions: str | Path,
    objects: str | Path,
    target: str | Path,
    *,
    questions: str | Path | None = None,
    vocabulary: str | Path | None = None,
    prior: str = "company",
    negatives: int = 1,
    seed: int = 0,
) -> dict[str, int]:
    """Captions and yes/no questions with ground truth -> tagged rows with synthetic negatives (see `synthetic_rows`).

    Args:
        captions: rows of any known schema with one image each.
        objects: ground truth, see `read_objects`.
        target: JSONL of rows, replaced when all went well.
        questions: rows whose answers begin with yes or no; added as `yes_no_rows`.
        vocabulary: see `read_vocabulary`.
        prior: where absent nouns are drawn from, see `prior_of`.

    Returns:
        Counts: "rows", "negatives", and what was left out and why.

    Raises:
        UserError: a file is missing or has no such lines, a row's image has no ground truth, an unknown prior.
    """
    truth = read_objects(objects)
    nouns = read_vocabulary(vocabulary, truth.values())
    notes: Counter = Counter()

    def scene_of(row: dict) -> Scene:
        return truth[_known_image(row["images"], truth, objects, row["source"])]

    rows = synthetic_rows(
        read_rows(captions),
        scene_of,
        nouns,
        prior_of(prior, truth.values(), nouns, objects),
        negatives,
        seed,
        notes=notes,
    )
    asked = yes_no_rows(read_rows(questions), notes) if questions is not None else ()
    return _write(target, chain(rows, asked), notes)


def write_on_policy(
    samples: str | Path,
    target: str | Path,
    *,
    objects: str | Path | None = None,
    vocabulary: str | Path | None = None,
    supervise: str = "all",
) -> dict[str, int]:
    """A model's own answers with ground truth -> tagged rows (see `on_policy_rows`).

    Args:
        samples: JSONL of `{"id", "images", "prompt", "answer"}` as `vlm-sft-rl eval` writes it; the nouns of the picture
            are `reference.objects`, unless `objects` is given.
        objects: ground truth by image, see `read_objects`.
        target, vocabulary: as of `write_synthetic`.
        supervise: "all" or "verdicts".

    Returns:
        Counts: "rows", "negatives", and what was left out and why.

    Raises:
        UserError: as `write_synthetic`; or a sample without ground truth.
    """
    if supervise not in SUPERVISE:
        raise UserError(f"supervise: {supervise!r} is not one of {', '.join(SUPERVISE)}.")
    truth = None if objects is None else read_objects(objects)
    known = list(_with_truth(samples, truth, objects))
    scenes = [Scene(sample["reference"]["objects"]) for sample in known] if truth is None else truth.values()
    nouns = read_vocabulary(vocabulary, scenes)
    notes: Counter = Counter()
    rows = on_policy_rows(known, object_grader(nouns), nouns, supervise=supervise, notes=notes)
    return _write(target, rows, notes)


def read_objects(path: str | Path) -> dict[str, Scene]:
    """Ground truth: lines `{"image": path, "objects": [noun or {"noun": noun}], "theme": text?}` by image path.

    Raises:
        UserError: a line without these fields, or an image that comes twice.
    """
    scenes: dict[str, Scene] = {}
    for number, raw in read_jsonl(path):
        where, image = f"{path}:{number}", raw.get("image")
        if not isinstance(image, str) or not image:
            raise RowError(
                FORMAT, f"field `image`: expected the path of a picture, found {image!r:.80}.", where
            )
        nouns = _nouns(raw.get("objects"), where)
        if scenes.setdefault(normpath(image), scene := Scene(nouns, raw.get("theme"))) is not scene:
            raise RowError(FORMAT, f"the image {image!r} was described before. Keep one line for it.", where)
    if not scenes:
        raise UserError(f"{path}: no pictures in it.")
    return scenes


def read_vocabulary(path: str | Path | None, scenes: Iterable[Scene]) -> list[str]:
    """The nouns that phrases are found by: one a line of the file, or all nouns of the ground truth.

    Raises:
        UserError: there is none.
    """
    if path is None:
        nouns = {noun for scene in scenes for noun in scene.objects}
    else:
        nouns = {line.strip().lower() for line in read_text(path).splitlines() if line.strip()}
    if not nouns:
        raise UserError(
            f"{path or 'the ground truth'}: no nouns. List those that answers may name, one a line."
        )
    return sorted(nouns)


def prior_of(
    name: str, scenes: Collection[Scene], nouns: Collection[str], where: str | Path = ""
) -> Prior | None:
    """How likely each noun is in a picture, for drawing absent ones.

    `company`: as often as it stands beside each of the nouns that are there, averaged over them, plus its share of all
    pictures, so that none of the vocabulary's nouns that occur is impossible. `theme`: its share of the pictures of that
    theme. `uniform`: all alike (then rare nouns are the wrong ones, and a model need not look).

    Raises:
        UserError: an unknown name, or no themes in the ground truth.
    """
    if name not in PRIORS:
        raise UserError(f"prior: {name!r} is not one of {', '.join(PRIORS)}.")
    if name == "uniform":
        return None
    known = set(nouns)
    if name == "theme":
        if any(scene.theme is None for scene in scenes):
            raise UserError(
                f"{where}: some lines have no `theme`, which the prior `theme` needs. Use `company`."
            )
        themes: dict[str | None, Counter] = {}
        for scene in scenes:
            themes.setdefault(scene.theme, Counter()).update(known & set(scene.objects))
        return themes
    alone: Counter = Counter()
    beside: dict[str, Counter] = {noun: Counter() for noun in nouns}
    for scene in scenes:
        present = known & set(scene.objects)
        alone.update(present)
        for noun in present:
            beside[noun].update(present - {noun})

    def company(scene: Scene) -> dict[str, float]:
        present = sorted(noun for noun in set(scene.objects) & known if alone[noun])
        weights = {noun: count / len(scenes) for noun, count in alone.items()}
        for noun in present:
            for other, count in beside[noun].items():
                weights[other] += count / alone[noun] / len(present)
        return weights

    return company


def _with_truth(
    samples: str | Path, truth: dict[str, Scene] | None, objects: str | Path | None
) -> Iterator[dict]:
    for number, sample in read_jsonl(samples):
        where = f"{samples}:{number}"
        for field, kind in (("id", str | int), ("images", list), ("prompt", str), ("answer", str)):
            if not isinstance(sample.get(field), kind):
                raise RowError(
                    FORMAT,
                    f"field `{field}`: found {sample.get(field)!r:.80}. Is this a samples file?",
                    where,
                )
        if truth is None:
            reference = sample.get("reference")
            found = reference.get("objects") if isinstance(reference, dict) else None
            if found is None:
                raise RowError(
                    FORMAT,
                    "no `reference.objects`, so its phrases cannot be graded. Give --objects FILE.",
                    where,
                )
            nouns = _nouns(found, where)
        else:
            nouns = truth[_known_image(sample["images"], truth, objects, where)].objects
        yield {**sample, "reference": {"objects": nouns}}


def _known_image(images: list, truth: dict[str, Scene], objects: str | Path | None, where: str) -> str:
    if len(images) != 1 or not isinstance(images[0], str):
        raise RowError(FORMAT, f"expected the path of one image, found {images!r:.80}.", where)
    image = normpath(images[0])
    if image not in truth:
        raise RowError(
            FORMAT,
            f"the image {images[0]!r} is not in {objects}. Write its path there as it is in the row.",
            where,
        )
    return image


def _nouns(objects: object, where: str) -> list[str]:
    found = (
        [item.get("noun") if isinstance(item, dict) else item for item in objects]
        if isinstance(objects, list)
        else None
    )
    if found is None or not all(isinstance(noun, str) and noun.strip() for noun in found):
        raise RowError(
            FORMAT,
            f'field `objects`: expected a list of nouns or of {{"noun": …}}, found {objects!r:.80}.',
            where,
        )
    return [noun.strip().lower() for noun in found]


def _write(target: str | Path, rows: Iterable[dict], notes: Counter) -> dict[str, int]:
    count = wrong = 0
    with replacing(target) as handle:
        for row in rows:
            row = {
                key: value for key, value in row.items() if key != "source"
            }  # its place is now the target's line
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
            wrong += any(UNCONFIDENT in message["content"] for message in row["messages"])
        if not count:
            raise UserError(f"{target}: nothing was written, no row could be made ({dict(notes)}).")
    return {"rows": count, "negatives": wrong, **notes}
