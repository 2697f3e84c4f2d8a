"""`accelerate launch -m vlm_sft_rl.self_training.worker JOB.json`: what a round of a loop asks of a model, in processes of
their own."""

import sys
from pathlib import Path

from ..errors import UserError, printable
from ..evaluation.decoders import EngineOptions
from ..io import read_json
from ..launch import end_with_parent
from .sampling import CheckpointSampler, run_sampling


def work(job: dict) -> None:
    """Do the job that its key `job` names: fill a sample store, or one of `rewinds.JOBS`.

    Args:
        job: of a store `model`, `image_root`, `options`, `folder`, `tasks`, `n`, `config`, `sampling`, `seed`, `label`.
    """
    if job["job"] != "sample":
        from .rewinds import JOBS

        JOBS[job["job"]](job)
        return
    sampler = CheckpointSampler(job["model"], job["image_root"], EngineOptions(**job["options"]))
    run_sampling(
        job["folder"],
        job["tasks"],
        job["n"],
        job["config"],
        sampler,
        sampling=job["sampling"],
        seed=job["seed"],
        label=job["label"],
    )


def main(argv: list[str] | None = None) -> int:
    end_with_parent()
    try:
        work(read_json(Path((argv if argv is not None else sys.argv[1:])[0])))
    except UserError as error:
        print(f"Error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
