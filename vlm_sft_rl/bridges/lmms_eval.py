"""A checkpoint of ours as a model of lmms-eval, so that its tasks run with our decoders.

    python -m lmms_eval --model vlm_sft_rl --tasks pope \
        --model_args pretrained=MODEL_DIR,decoder=retrospective,threshold=0.5

Needs lmms-eval 0.6 or newer, which finds this class by an entry point of ours.
"""

from pathlib import Path

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..evaluation.decoders import (
    DECODERS,
    DecoderConfig,
    answer_batch,
    check_alone,
    check_model_folder,
    configure,
    load_model_and_processor,
)
from .requests import answer_requests


class VlmSftRl(lmms):
    """Generation tasks with any decoder of `vlm-sft-rl generate`.

    Args:
        pretrained: a checkpoint or adapter folder.
        decoder: as `vlm-sft-rl generate --decoder`.
        batch_size: answers decoded side by side.
        device, dtype: as in `load_for_inference`.
        seed: of everything that is drawn.
        settings: options of the decoder; a task's length limit comes before them, and so does its temperature where the
            decoder has one to set (the one that `retrospective` starts from is the checkpoint's own).
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        decoder: str = "greedy",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **settings,
    ):
        super().__init__()
        self.folder, self.decoder, self.seed = Path(pretrained), decoder, int(seed)
        self.batch_size, self.settings = int(batch_size), settings
        check_alone(decoder, self._config({}))
        check_model_folder(self.folder)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.loaded = load_model_and_processor(self.folder, device, dtype)

    def _config(self, limits: dict) -> DecoderConfig:
        defaults = {"temperature": 1.0} if self.decoder == "sample" else {}
        return configure(self.decoder, self.folder, self.settings | limits, spec=defaults, seed=self.seed)

    def _answer(self, request: dict, images: list, prompts: list[str], names: list[str]) -> list[str]:
        limits = {"max_new_tokens": request["max_new_tokens"]}
        entry = DECODERS[self.decoder]
        if request["temperature"] and "temperature" in entry.options() and self.decoder != "retrospective":
            limits["temperature"] = request["temperature"]
        answers = answer_batch(
            self.loaded, entry, self._config(limits), images, prompts, names, self.batch_size
        )
        return [answer["text"] for answer in answers]

    def generate_until(self, requests) -> list[str]:
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answers") as progress:
            return answer_requests(
                [request.args for request in requests],
                lambda task, split, identity: self.task_dict[task][split][identity],
                self._answer,
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
