"""A checkpoint of ours as a model of lmms-eval, so that its tasks run with our decoders.

    python -m lmms_eval --model vlm_sft_rl --tasks pope \
        --model_args pretrained=MODEL_DIR,decoder=retrospective,threshold=0.5

Needs lmms-eval 0.6 or newer, which finds this class by an entry point of ours.
"""

from pathlib import Path

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..errors import UserError
from ..evaluation.candidates import REFLECTING, SEARCHING
from ..evaluation.decoders import (
    DECODERS,
    answer_batch,
    check_model_folder,
    choose_threshold,
    correction_settings,
    load_system,
    opera_settings,
    retrospective_settings,
    searching_settings,
)
from ..evaluation.specs import Decoding, EvalSpec
from .requests import answer_requests

# made from another run, or by a vote over answers that only a spec's metric can read
_NOT_HERE = ("drop", "stop", "majority")
_SPEC = EvalSpec("lmms_eval", "a task of lmms-eval", "-", "answer_accuracy", decoding=Decoding())


class VlmSftRl(lmms):
    """Generation tasks with any decoder of `vlm-sft-rl eval` but `drop`, `stop` and `majority`.

    Args:
        pretrained: a checkpoint or adapter folder.
        decoder: as `vlm-sft-rl eval --decoder`.
        threshold: tau on P(</UN>); default the checkpoint's own.
        batch_size: answers decoded side by side.
        device, dtype: as in `load_for_inference`.
        seed: of everything that is drawn.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        decoder: str = "greedy",
        threshold: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **kwargs,
    ):
        super().__init__()
        if kwargs:
            raise UserError(f"model_args: unknown {', '.join(sorted(kwargs))}.")
        if decoder not in DECODERS or decoder in _NOT_HERE:
            known = [name for name in DECODERS if name not in _NOT_HERE]
            raise UserError(f"model_args: decoder={decoder}; expected one of {', '.join(known)}.")
        folder = check_model_folder(Path(pretrained))
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.threshold = choose_threshold(_SPEC, folder, decoder, threshold)
        self.folder, self.decoder, self.seed, self.batch_size = folder, decoder, int(seed), int(batch_size)
        self.model, self.processor = load_system(folder, device=device, dtype=dtype)

    def _settings(self, asked: dict) -> dict:
        settings = {"decoder": self.decoder, "seed": self.seed, **asked}
        if self.decoder == "retrospective":
            common = {
                "threshold": self.threshold,
                "max_new_tokens": asked["max_new_tokens"],
                "seed": self.seed,
            }
            settings["retrospective"] = retrospective_settings(_SPEC, self.folder, {}, common)
        if self.decoder == "correct":
            settings["correction"] = correction_settings(self.folder, {}, {**asked, "seed": self.seed})
        if self.decoder == "opera":
            settings["opera"] = opera_settings({})
        if self.decoder in (*REFLECTING, *SEARCHING):
            heat = {"temperature": asked["temperature"]} if asked["temperature"] else {}
            heat = {} if self.decoder == "self-refine" else heat
            settings["candidates"] = searching_settings(_SPEC, self.decoder, heat, self.seed)
        if self.decoder == "sample" and not asked["temperature"]:
            settings["temperature"] = 1.0
        if self.decoder == "greedy":
            settings["temperature"] = 0.0
        return settings

    def generate_until(self, requests) -> list[str]:
        def answer(asked, images, prompts, names) -> list[str]:
            found = answer_batch(
                self.model, self.processor, self._settings(asked), images, prompts, names, self.batch_size
            )
            return [item["text"] for item in found]

        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers") as progress:
            return answer_requests(
                [request.args for request in requests],
                lambda task, split, identity: self.task_dict[task][split][identity],
                answer,
                progress.update,
                4 * self.batch_size,
            )

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "vlm_sft_rl answers by generation: choose tasks of the output type generate_until"
        )

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(
            "vlm_sft_rl answers one turn: choose tasks of the output type generate_until"
        )
