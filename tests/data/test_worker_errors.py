"""A bad row is one message whether the main process meets it or a worker of the data loader."""

import pickle

import families
import pytest
from PIL import Image
from torch.utils.data import DataLoader, _utils

from vlm_sft_rl.data.collators import RegionCollator, VisionCollator
from vlm_sft_rl.errors import FORMAT, RowError

REGION = {"id": "r", "image": "a.png", "width": 9, "height": 9, "box": [1, 2, 3, 4]}
ROW = {
    "id": "q",
    "images": ["absent.png"],
    "messages": [{"role": "user", "content": "<image>Is it?"}, {"role": "assistant", "content": "Yes."}],
}


class SeveralLines:
    def __call__(self, rows):
        try:
            raise RowError(FORMAT, "the cause")
        except RowError as error:
            raise RowError(FORMAT, "first line:\n  second line.", "file:3") from error


def collators(root):
    Image.new("RGB", (8, 8)).save(root / "a.png")
    return {
        "rows": (VisionCollator(families.llava()[1], root), ROW),
        "regions": (RegionCollator(root), {**REGION, "image": "absent.png"}),
        "size": (RegionCollator(root), REGION),
        "several lines": (SeveralLines(), ROW),
    }


@pytest.mark.parametrize("name", ["rows", "regions", "size", "several lines"])
def test_a_workers_error_reads_as_the_main_process_says_it(tmp_path, name, monkeypatch):
    # seconds for which the loader waits for a worker that already stopped
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    collator, row = collators(tmp_path)[name]
    said = []
    for workers in (0, 1):
        with pytest.raises(RowError) as caught:
            list(DataLoader([row], collate_fn=collator, num_workers=workers))
        said.append(str(caught.value))
    assert said[0] == said[1] != ""


def test_what_pickle_carries_is_whole():
    error = pickle.loads(pickle.dumps(RowError(FORMAT, "no box.", "file:3")))
    assert (error.kind, error.reason, error.where, str(error)) == (
        FORMAT,
        "no box.",
        "file:3",
        "file:3: no box.",
    )
