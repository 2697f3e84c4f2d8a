"""A describer step of `SCTuneTrainer` beside one with the released code's list of passes, on the same model and boxes."""

import itertools
import statistics
import tempfile
import time
from contextlib import contextmanager

import numpy as np
import torch
from bench import main, random_images, tiny_llava
from sft import TEMPLATE

from vlm_sft_rl.models.parts import set_trainable
from vlm_sft_rl.rewards.regions import iou
from vlm_sft_rl.trainers.sc_tune.batches import answer_log_probs, complete
from vlm_sft_rl.trainers.sc_tune.config import SCTuneConfig
from vlm_sft_rl.trainers.sc_tune.policy import clipped_surrogate
from vlm_sft_rl.trainers.sc_tune.trainer import SCTuneTrainer

SIDE = 168
# scale of the logits at which one token holds the published top_p at every place, so that each sampled description is the
# greedy one: so it is with a trained describer (all of 227 tokens of the pocket start's)
PEAKED = 200.0
# per image 0.4 of the language model's multiplications, as the tower of Qwen2-VL-7B has (0.67 B on four patches a token
# against 6.5 B on one); that of the published Qwen-VL has 0.85
TOWER = {"vision_hidden": 192, "vision_layers": 4}
SETTINGS = {
    "": {},
    "_peaked": {"sharpness": PEAKED},
    "_projector": {"sharpness": PEAKED, "trained_projector": True},
}


def run(boxes: int = 8, repeats: int = 7, seed: int = 0, device: str | None = None) -> dict:
    """Time both steps alternately.

    The released step (methods as read from its code): describe by the live model, sampled; locate by the frozen copy;
    describe and locate greedily by the frozen copy, each a `generate` of its own that encodes the image; log-probabilities
    of description and box under live and frozen weights (those of the box serve logging alone); two updates. Ours makes
    the same samples' worth of tokens and the same two updates.

    Everything is timed three times. Random weights say every word with nearly the same probability, so that no sampled
    description begins as the greedy one does: `flat`. With logits scaled up the published `top_p` leaves one token, as it
    nearly always does in a trained describer: `peaked`. Random located boxes are never the right ones, in both. In these
    two the language model alone is trained, as with LoRA; `projector` is `peaked` with the projector trained too, as
    published, so that features of an image do not outlive an update and the projector runs in every pass.

    Returns:
        `ratios` (theirs over ours, medians): `step`, and `rollout` = all that comes before the updates; seconds; and
        per step and box the images encoded and the tokens sent through the language model. Names end in `_peaked` and
        `_projector` for the second and third timing.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {"ratios": {}, "quartiles": {}, "seconds": {}, "per_box": {}}
    for suffix, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            one = _timed(_Bench(folder, boxes, seed, device, **settings), repeats)
        for key, own in one.items():
            found[key] |= {name + suffix: value for name, value in own.items()}
    return found | {"boxes": boxes, "repeats": repeats, "device": device, "seed": seed}


def _timed(bench: "_Bench", repeats: int) -> dict[str, dict]:
    bench.ours(), bench.released()
    pairs = []
    for i in range(repeats):
        first, second = (bench.ours, bench.released) if i % 2 else (bench.released, bench.ours)
        one, other = first(), second()
        pairs.append((one, other) if i % 2 else (other, one))
    steps = [sum(theirs) / sum(ours) for ours, theirs in pairs]
    return {
        "ratios": {
            "step": statistics.median(steps),
            "rollout": statistics.median(theirs[0] / ours[0] for ours, theirs in pairs),
        },
        "quartiles": {"step": np.quantile(steps, (0.25, 0.75)).tolist()},
        "seconds": {
            "ours": {"rollout": _median(pairs, 0, 0), "updates": _median(pairs, 0, 1)},
            "released": {"rollout": _median(pairs, 1, 0), "updates": _median(pairs, 1, 1)},
        },
        "per_box": {
            name: {key: value / len(bench.rows) for key, value in _counted(bench, step).items()}
            for name, step in (("ours", bench.ours), ("released", bench.released))
        },
    }


def _median(pairs, side: int, part: int) -> float:
    return statistics.median(pair[side][part] for pair in pairs)


class _Bench:
    def __init__(
        self,
        folder: str,
        boxes: int,
        seed: int,
        device: str,
        *,
        sharpness: float = 1.0,
        trained_projector: bool = False,
    ):
        model, processor = tiny_llava(seed=seed, **TOWER)
        with torch.no_grad():
            model.lm_head.weight *= sharpness
        processor.chat_template = TEMPLATE
        set_trainable(model, vision=False, projector=trained_projector, language=True)
        pictures = random_images(boxes, SIDE, seed=seed)
        self.rows = [
            {
                "id": str(i),
                "image": p,
                "picture": p,
                "width": SIDE,
                "height": SIDE,
                "box": [8, 8, 90, 90],
                "resized": None,
            }
            for i, p in enumerate(pictures)
        ]
        args = SCTuneConfig(
            folder,
            per_device_train_batch_size=boxes,
            learning_rate=1e-9,
            use_cpu=device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            box_convention="llava",
            describe_prompt="x {box}",
            locate_prompt="x {description} 7",
            locate_max_new_tokens=20,
            disable_tqdm=True,
            seed=seed,
        )
        # random boxes earn nothing, and a step without signal makes no updates. In turn asked for are sampled and greedy
        # descriptions; what looks like a leak earns nothing above 0
        turn = itertools.cycle((-0.1, 0.0))
        self.trainer = SCTuneTrainer(
            model, args, train_dataset=[{k: v for k, v in row.items() if k != "picture"} for row in self.rows],
            processing_class=processor, reward_funcs=lambda completions, **columns: [next(turn)] * len(completions),
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.make_copies()
        self.model = self.trainer.model.train()
        self.device = device

    def ours(self) -> tuple[float, float]:
        """Seconds of rollout and of the rest of a step."""
        rollouts, spent = self.trainer.rollouts.describer, []

        def timed(*arguments):
            start = self._now()
            found = rollouts(*arguments)
            spent.append(self._now() - start)
            return found

        self.trainer.rollouts.describer = timed
        start = self._now()
        self.trainer._describer_step(self.model, self.rows, len(self.rows))
        self.trainer.update(self.model)
        total = self._now() - start
        self.trainer.rollouts.describer = rollouts
        return spent[0], total - spent[0]

    def released(self) -> tuple[float, float]:
        trainer, args, frozen = self.trainer, self.trainer.args, self.trainer.frozen
        start = self._now()
        with trainer.decoding(self.model) as model:
            describe = [trainer.prompts.describe(row) for row in self.rows]
            said = self._generate(model, describe, args.describe_max_new_tokens, sample=True)
            with frozen.active():
                located = self._locate(model, said)
                greedy = self._generate(model, describe, args.describe_max_new_tokens)
                again = self._locate(model, greedy)
            description = self._batch([trainer.prompts.describe_tail(row) for row in self.rows], said)
            box = self._batch([trainer.prompts.locate_tail(self._text(ids)) for ids in said], located)
            old = answer_log_probs(model, description)
            answer_log_probs(model, box)
            with frozen.active():
                reference = answer_log_probs(model, description)
                answer_log_probs(model, box)
        reward = [
            self._iou(a, r) - self._iou(b, r) for a, b, r in zip(located, again, self.rows, strict=True)
        ]
        gain = torch.tensor(reward, device=old.device)[:, None] - 0.01 * (old - reference)
        middle = self._now()
        for _ in range(args.inner_epochs):
            log_probs = answer_log_probs(self.model, description)
            found = clipped_surrogate(log_probs, old, gain, description.mask, args.clip_range)
            (found.loss / found.tokens).backward()
            trainer.update(self.model)
        return middle - start, self._now() - middle

    def _generate(self, model, texts: list[str], limit: int, sample: bool = False) -> list[list[int]]:
        processor = self.trainer.processing_class
        inputs = processor(
            text=texts, images=[[row["picture"]] for row in self.rows], padding=True, padding_side="left",
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        args = self.trainer.args
        chosen = (
            {"do_sample": True, "top_k": args.top_k, "top_p": args.top_p} if sample else {"do_sample": False}
        )
        out = model.generate(**inputs, max_new_tokens=limit, **chosen)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def _locate(self, model, said: list[list[int]]) -> list[list[int]]:
        prompts = self.trainer.prompts
        texts = [prompts.render(prompts.locate(self._text(ids))) for ids in said]
        return self._generate(model, texts, self.trainer.args.locate_max_new_tokens)

    def _text(self, ids: list[int]) -> str:
        return self.trainer.processing_class.tokenizer.decode(ids, skip_special_tokens=True)

    def _batch(self, tails: list[list[int]], answers: list[list[int]]):
        prompts = self.trainer.prompts
        return complete(prompts, self.rows, tails, answers, [None], self.device, torch.float32)

    def _iou(self, ids: list[int], row: dict) -> float:
        return iou(self.trainer.prompts.located(ids, row), row["box"])

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _counted(bench: _Bench, step) -> dict[str, int]:
    """Images through the vision tower and tokens through the language model in one step."""
    tower, language = bench.model.model.vision_tower, bench.model.model.language_model
    with (
        _watch(tower, lambda args, kwargs: len(args[0] if args else kwargs["pixel_values"])) as images,
        _watch(language, lambda args, kwargs: kwargs["inputs_embeds"].shape[:2].numel()) as tokens,
    ):
        step()
    return {"images_encoded": sum(images), "tokens": sum(tokens)}


@contextmanager
def _watch(module: torch.nn.Module, measure):
    seen: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(int(measure(args, kwargs))), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


if __name__ == "__main__":
    main(__file__, run)
