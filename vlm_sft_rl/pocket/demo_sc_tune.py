"""`vlm-sft-rl demo sc_tune`: a grounding model, the describer-locator loop on boxes without text, and what it changed.

Every stage writes its result and is left out when the result is there, so an interrupted demo goes on where it was.
"""

import json
from functools import partial
from pathlib import Path

from rich.console import Console

from ..data.images import open_image
from ..errors import UserError
from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..launch import launch_training
from ..recipes import find, load_recipe
from .dataset import build_world
from .language import CAPTION_PROMPT
from .regions import build_regions, messages, scenes_of
from .sc_tune_figures import SHOWN, SPECS, measure
from .stages import Stages
from .warmup import warm_up

BASE = Path(__file__).parent / "base"
RECIPE = "sc_tune/pocket"
SYSTEMS = ("start", "control", "tuned")
WARM_UP_STEPS = 200
WORLD = ("pocket/world.py", "pocket/twins.py", "pocket/render.py", "pocket/regions.py")
WARMED = (*WORLD, "pocket/base", "pocket/warmup.py", "data/collators.py")
CAPTIONED = (*WARMED, "decoding", "pocket/demo_sc_tune.py")
RECIPE_FILE = find("recipes", RECIPE)
TRAINED = (*CAPTIONED, "trainers", "rewards", "methods/sc_tune.py", RECIPE_FILE)
MEASURED = (
    *TRAINED,
    "evaluation",
    "pocket/sc_tune_figures.py",
    *(find("eval", name) for name in SPECS),
)


class Demo:
    """One demo folder: where its parts are, and how they are made."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        seed: int = 0,
        scenes: int = 300,
        steps: int | None = None,
        warm_up_steps: int = WARM_UP_STEPS,
        keep_stale: bool = False,
    ):
        self.folder, self.console, self.seed, self.scenes = folder, console, seed, scenes
        self.steps = steps if steps is not None else int(load_recipe(RECIPE_FILE)["max_steps"])
        self.regions, self.world, self.models = folder / "regions", folder / "world", folder / "models"
        self.warm_up_steps = warm_up_steps
        settings = {"seed": seed, "scenes": scenes, "steps": self.steps, "warm_up_steps": warm_up_steps}
        path = folder / "demo.json"
        if path.exists() and read_json(path) != settings:
            raise UserError(
                f"{path}: this folder holds a demo with other settings ({read_json(path)}). Choose another "
                "--output-dir or delete the folder."
            )
        write_json(path, settings)
        self.stages = Stages(folder, console, keep_stale=keep_stale)

    def prepare(self) -> None:
        """Scenes, the start, and the start's captions: what every way of tuning begins with."""
        self.stages.run("draw scenes of twins", self.draw, WORLD)
        warm = partial(self.warm, "start", BASE, self.warm_up_steps)
        self.stages.run("warm up a grounding model", warm, WARMED)
        self.stages.run("caption the loop's images with the start", self.caption, CAPTIONED)

    def draw(self) -> None:
        build_regions(self.regions, seed=self.seed, sizes={"test": self.scenes})
        # captions of ordinary scenes: what the loop must not spoil
        build_world(self.world, seed=self.seed, sizes={"train": 1, "val": 1, "test": self.scenes})

    @property
    def replay(self) -> Path:
        return self.folder / "replay.jsonl"

    def caption(self) -> None:
        """Captions that the start itself writes, greedily, for the loop's images: what it shall not forget."""
        from ..decoding import generate_plain
        from ..models.load import load_for_inference

        model, processor, _ = load_for_inference(self.models / "start")
        paths = list(dict.fromkeys(row["image"] for _, row in read_jsonl(self.regions / "train.jsonl")))
        answers = generate_plain(
            model,
            processor,
            [open_image(path, self.regions) for path in paths],
            [CAPTION_PROMPT] * len(paths),
            temperature=0.0,
            max_new_tokens=96,
            seed=self.seed,
            batch_size=50,
        )
        pairs = zip(paths, answers, strict=True)
        rows = [messages(f"{Path(path).stem}-caption", path, CAPTION_PROMPT, one.text) for path, one in pairs]
        write_jsonl(self.replay, rows)

    def warm(self, system: str, source: Path, steps: int, **settings) -> None:
        rows = self.regions / "warmup.jsonl"
        warm_up(source, self.models / system, rows, self.regions, steps=steps, seed=self.seed, **settings)

    def train_control(self) -> None:
        """As many updates as the loop makes, by its schedule, on the warm-up rows and its share of replayed ones."""
        share = load_recipe(RECIPE_FILE)["replay_share"]
        steps = supervised_steps(self.steps)
        settings = {"decay_steps": decay_steps(steps), "replay": self.replay, "replay_share": share}
        self.warm("control", self.models / "start", steps, **settings)

    def tune(self, system: str = "tuned", **overrides) -> None:
        """Train in a process of its own through `accelerate launch`, as a user would."""
        settings = {
            "model_name_or_path": self.models / "start",
            "train_file": self.regions / "train.jsonl",
            "image_root": self.regions,
            "replay_file": self.replay,
            "output_dir": self.models / system,
            "max_steps": self.steps,
            "seed": self.seed,
            **overrides,
        }
        decay = {"num_decay_steps": decay_steps(settings["max_steps"])}
        settings["lr_scheduler_kwargs"] = json.dumps(decay, separators=(",", ":"))
        words = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]
        if status := launch_training(RECIPE, words, "cpu"):
            raise UserError(f"training {system} failed with status {status}; the message is above.")

    def measure(self, system: str) -> None:
        scenes = scenes_of(self.regions)
        places = {"regions": self.regions, "world": self.world}
        found = measure(self.folder, system, **places, scenes=scenes, seed=self.seed)
        write_json(self.folder / "eval" / f"{system}.json", found)
        words = ", ".join(f"{name} {found['metrics'][name]['value']:.3f}" for name in SHOWN)
        self.console.print(f"  {system}: {words}")


def phase_steps(steps: int) -> tuple[int, int]:
    """Describer and locator steps among the first `steps` of the recipe's loop."""
    recipe = load_recipe(RECIPE_FILE)
    describing, locating = recipe["describer_steps"], recipe["locator_steps"]
    full, rest = divmod(steps, describing + locating)
    describer = full * describing + min(rest, describing)
    return describer, steps - describer


def decay_steps(steps: int) -> int:
    """Over how many of the last of `steps` updates the learning rate falls: the recipe's share of them."""
    recipe = load_recipe(RECIPE_FILE)
    return round(steps * recipe["lr_scheduler_kwargs"]["num_decay_steps"] / recipe["max_steps"])


def supervised_steps(steps: int) -> int:
    """How many updates the control gets: as many as the loop makes, inner ones included."""
    describer, locator = phase_steps(steps)
    return describer * load_recipe(RECIPE_FILE).get("inner_epochs", 2) + locator


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    scenes: int = 300,
    steps: int | None = None,
    warm_up_steps: int = WARM_UP_STEPS,
    keep_stale: bool = False,
    console: Console | None = None,
) -> dict:
    """Run or resume the demo and return its summary.

    Args:
        scenes: test scenes (some five boxes each); steps: of the loop, None takes the recipe's.

    Raises:
        UserError: `output_dir` holds a demo with other settings or of other code, or a stage failed.
    """
    from transformers.utils import logging

    from .sc_tune_report import finish

    logging.disable_progress_bar()
    demo = Demo(
        Path(output_dir),
        console or Console(),
        seed=seed,
        scenes=scenes,
        steps=steps,
        warm_up_steps=warm_up_steps,
        keep_stale=keep_stale,
    )
    demo.prepare()
    stages = demo.stages
    stages.run("close the loop on boxes without text", demo.tune, TRAINED)
    stages.run("train the control on the warm-up rows", demo.train_control, (*CAPTIONED, RECIPE_FILE))
    for system in SYSTEMS:
        stages.run(f"measure {system}", lambda system=system: demo.measure(system), MEASURED)
    return finish(demo)
