"""How a checkpoint is asked about boxes: its own words and box convention, describing, locating."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from ..errors import UserError
from ..rewards.regions import spells_coordinates
from .decoders import model_type
from .specs import Regions


def region_settings(regions: Regions, folder: Path) -> dict:
    """What the answers depend on besides decoding: task, box convention and prompts.

    A prompt is the one that the checkpoint was trained with, else the spec's for its family, else that of LLaVA-1.5's
    training rows; the box convention is the spec's, else the checkpoint's, else its family's.

    Raises UserError: no box convention is known for this family.
    """
    from ..models.boxes import convention_for
    from ..models.regions import DESCRIBE, LOCATE
    from ..models.sidecar import Sidecar, read_sidecar

    sidecar, family = read_sidecar(folder) or Sidecar(), model_type(folder)
    trained = sidecar.recipe or {}
    named = regions.box_convention or sidecar.box_convention
    settings = {
        "task": regions.task,
        "box_convention": convention_for(SimpleNamespace(model_type=family), named).name,
    }
    if regions.describes:
        prompt = trained.get("describe_prompt") or regions.prompt("describe_prompt", family)
        settings["describe_prompt"] = prompt or DESCRIBE
    if regions.locates:
        prompt = trained.get("locate_prompt") or regions.prompt("locate_prompt", family)
        settings["locate_prompt"] = prompt or LOCATE
    if regions.task == "describe_and_locate":
        settings["locate_max_new_tokens"] = regions.locate_max_new_tokens
    return settings


class RegionSystem:
    """A loaded checkpoint that answers rows with `box`, `width` and `height`.

    Args:
        loaded: model and processor.
        settings: the decoder's `max_new_tokens`, and under `regions` what `region_settings` gave.
        answer: `(images, prompts, ids) -> Answer.to_json()` of each, by the decoder of descriptions.
        batch_size: rows located side by side; no effect on the answers.

    Raises UserError: the checkpoint's cache cannot be rewound (see `decoding.branches`), or its processor marks no image.
    """

    def __init__(self, loaded: tuple, settings: dict, answer: Callable[..., list[dict]], batch_size: int):
        from ..decoding.branches import check_branching
        from ..models.boxes import CONVENTIONS
        from ..models.regions import DESCRIBE, LOCATE, RegionPrompts

        self.model, self.processor = loaded
        self.answer, self.batch_size = answer, batch_size
        self.max_new_tokens, self.regions = settings["max_new_tokens"], settings["regions"]
        self.prompts = RegionPrompts(
            self.processor,
            CONVENTIONS[self.regions["box_convention"]],
            self.regions.get("describe_prompt", DESCRIBE),
            self.regions.get("locate_prompt", LOCATE),
        )
        if self.regions["task"] != "describe":
            check_branching(self.model)

    def __call__(self, rows: Sequence[dict], images: Sequence[list]) -> tuple[list[str], list[dict]]:
        """Prompts and answers (`Answer.to_json()`) of rows; an answer also has what its task adds.

        `located`: (x0, y0, x1, y1) in pixels or None where no box could be read; `leak`: whether a description spells
        coordinates.

        Raises UserError: a picture is not of the size that its row says.
        """
        rows = [self._with_picture(row, pictures[0]) for row, pictures in zip(rows, images, strict=True)]
        if self.regions["task"] == "locate":
            texts = [row["question"] for row in rows]
            return [self.prompts.locate(text) for text in texts], self._locate(
                rows, texts, self.max_new_tokens
            )
        prompts = [self.prompts.describe_question(row) for row in rows]
        answers = self.answer(images, prompts, [row["id"] for row in rows])
        for answer in answers:
            answer["leak"] = spells_coordinates(answer["text"], self.prompts.finds_box)
        if self.regions["task"] == "describe_and_locate":
            texts = [answer["text"] for answer in answers]
            boxes = self._locate(rows, texts, self.regions["locate_max_new_tokens"])
            for answer, text, box in zip(answers, texts, boxes, strict=True):
                answer["located"] = box["located"]
                event = {"kind": "locate", "prompt": self.prompts.locate(text), "text": box["text"]}
                answer["trace"].append(event)
                answer["counts"] = {name: n + box["counts"][name] for name, n in answer["counts"].items()}
        return prompts, answers

    def _with_picture(self, row: dict, picture) -> dict:
        if picture.size != (row["width"], row["height"]):
            raise UserError(
                f"{row['id']}: the picture {row['images'][0]} is {picture.width} x {picture.height}, the row says "
                f"{row['width']} x {row['height']}: its box would be in the wrong place. Fetch the pictures that the "
                "boxes were drawn on."
            )
        return {**row, "picture": picture, "resized": self.prompts.resized(picture)}

    def _locate(self, rows: list[dict], texts: Sequence[str], longest: int) -> list[dict]:
        """Greedy boxes of texts, each on its row's picture; the convention's opening is forced, as it is in training."""
        from ..decoding.answers import Answer, Counts
        from ..decoding.branches import ImageBranches
        from ..decoding.sampling import GREEDY

        answers = []
        for start in range(0, len(rows), self.batch_size):
            part, part_texts = rows[start : start + self.batch_size], texts[start : start + self.batch_size]
            rendered = [self.prompts.render(self.prompts.locate(text)) for text in part_texts]
            branches = ImageBranches(self.model, self.processor, [row["picture"] for row in part], rendered)
            tails = [self.prompts.locate_tail(text) for text in part_texts]
            sequences = branches.ask([[tail] for tail in tails], [[GREEDY]] * len(part), longest)
            # where an opening is forced, the questions go through the model once more
            again = tails != branches.tails
            for i, ((ids,), row) in enumerate(zip(sequences, part, strict=True)):
                forwarded = branches.prefixes[i] + len(branches.tails[i]) + again * len(tails[i])
                counts = Counts(
                    tokens_forwarded=forwarded + len(ids) - 1,
                    tokens_kept=len(ids),
                    forwards=again + len(ids),
                    image_encodes=1,
                    prompt_tokens=branches.prefixes[i] + len(tails[i]),
                )
                text, box = self.prompts.located_text(ids), self.prompts.located(ids, row)
                answer = asdict(Answer(text, text, True, text, text, counts=counts, id=row["id"]))
                answers.append(answer | {"located": None if box is None else list(map(float, box))})
        return answers
