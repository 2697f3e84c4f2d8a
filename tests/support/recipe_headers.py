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


def estimate_of(name: str) -> tuple[str, int, int]:
    """The memory that a header names, in GiB with one digit, and the rows and tokens that it stands on."""
    text = recipes.find("recipes", name).read_text()
    said = re.search(
        r"Estimated by --dry-run: ([\d.]+) GiB per GPU and 1-2 GiB for CUDA, at (\d+) rows? of (\d+) tokens",
        text,
    )
    assert said, f"{name}: the header has no line of that form"
    return said[1], int(said[2]), int(said[3])
