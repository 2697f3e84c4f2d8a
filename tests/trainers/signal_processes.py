"""Run by `torchrun` on two processes: SC-Tune's describer steps with a signal on one process alone, then on none."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from regions import trainer

from vlm_sft_rl.train import leave_process_group

RANK = os.environ.get("RANK", "0")


def reward(completions, trainer_state, **columns):
    if RANK == "1" and trainer_state.global_step == 0:
        return [1.0 / (1 + len(text)) for text in completions]
    return [0.7] * len(completions)


def main(folder: Path, steps: int) -> None:
    made = trainer(folder / "out", reward_funcs=reward, kl_coef=0.0, max_steps=steps, describer_steps=steps)
    sums = []
    skip_update = made.skip_update
    made.skip_update = lambda: sums.append(total(made.model)) or skip_update()
    start = total(made.model)
    made.train()
    skipped = [e["describer/skipped"] for e in made.state.log_history if "describer/skipped" in e]
    figures = {"start": start, "sums": sums, "end": total(made.model), "skipped": skipped}
    (folder / f"rank{RANK}.json").write_text(json.dumps(figures))
    leave_process_group()


def total(model) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
