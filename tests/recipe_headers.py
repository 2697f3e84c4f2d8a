"""What the comment at the top of a recipe says, for tests."""

import re

from vlm_sft_rl import recipes


def advised_launch(name: str) -> tuple[str, int]:
    """The accelerate config of a header's launch line, and its processes; all lines of a header agree."""
    text = recipes.find("recipes", name).read_text().replace("\\\n#", " ")
    (config,) = set(re.findall(r"accelerate_configs/(\w+)\.yaml", text))
    counts = {int(n) for n in re.findall(r"--num[_-]processes (\d+)", text)} or {1}
    (count,) = counts
    return config, count
