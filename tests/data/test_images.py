import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vlm_sft_rl.data import images
from vlm_sft_rl.data.images import image_root_of, image_size, open_image, store_image
from vlm_sft_rl.errors import RowError, UserError


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    Image.new("RGB", (8, 4), "red").save(folder / "a.png")
    Image.new("RGB", (8, 4), "red").save(tmp_path / "outside.png")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:50])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


def test_paths_bytes_and_pictures_open_alike(root):
    path = root / "a.png"
    for item in ("a.png", str(path), Image.open(path), {"bytes": path.read_bytes()}, {"path": "a.png"}):
        image = open_image(item, root)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 4), (255, 0, 0))


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("none.png", "missing image"),
        ("../outside.png", "path leaves image_root"),
        ("link.png", "path leaves image_root"),
        ("/etc/hostname", "path leaves image_root"),
        ("text.jpg", "unreadable image"),
        ("cut.png", "unreadable image"),
        ("dir.png", "unreadable image"),
        ("pipe.png", "unreadable image"),
        ("loop.png", "missing image"),
        ("a\0.png", "missing image"),
        ("https://example.org/a.png", "format"),
        (3, "format"),
        ({"bytes": b"nothing"}, "unreadable image"),
    ],
)
def test_bad_images(root, item, kind):
    with pytest.raises(RowError) as caught:
        open_image(item, root)
    assert caught.value.kind == kind


@pytest.mark.parametrize("size", [(60, 60), (200, 200)])
def test_image_bombs_are_errors_at_once_and_at_twice_the_limit(root, monkeypatch, size):
    monkeypatch.setattr(images, "LARGEST_IMAGE", 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    Image.new("1", size).save(root / "bomb.png")
    with pytest.raises(RowError) as caught:
        open_image("bomb.png", root)
    assert caught.value.kind == "image bomb"


def test_exif_rotation(root):
    """The size is read without the picture, and is the upright one."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 4), "red").save(root / "turned.jpg", exif=exif)
    data = {"bytes": (root / "turned.jpg").read_bytes(), "path": None}
    for item, size in (("turned.jpg", (4, 8)), (data, (4, 8)), (Image.open(root / "a.png"), (8, 4))):
        assert open_image(item, root).size == image_size(item, root) == size
    with pytest.raises(RowError, match=r"text\.jpg"):
        image_size("text.jpg", root)


def test_equal_pictures_are_stored_as_one_file(tmp_path, root):
    data = (root / "a.png").read_bytes()
    path = store_image(data, tmp_path / "pictures")
    assert store_image(data, tmp_path / "pictures") == path and path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.suffix == ".png"


def test_transparency_is_laid_on_white(root):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(root / "clear.png")
    palette = Image.new("P", (4, 4), 0)
    palette.save(root / "palette.png", transparency=0)
    for name in ("clear.png", "palette.png"):
        assert open_image(name, root).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(root):
    Image.fromarray(np.full((4, 4), 0x4000, dtype=np.uint16)).save(root / "grey.png")
    buffer = io.BytesIO((root / "grey.png").read_bytes())
    assert Image.open(buffer).mode.startswith("I")
    assert open_image("grey.png", root).getpixel((0, 0)) == (0x40, 0x40, 0x40)


def test_image_paths_start_from_the_rows_file_unless_said_otherwise(tmp_path, monkeypatch):
    rows = tmp_path / "sets" / "rows.jsonl"
    rows.parent.mkdir()
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file"):
        image_root_of(rows)
    rows.write_text("")
    monkeypatch.chdir(tmp_path)
    assert image_root_of("sets/rows.jsonl") == rows.parent.resolve()
    assert image_root_of("sets/rows.jsonl", "sets") == Path("sets")
    with pytest.raises(UserError, match="'absent' is not a folder"):
        image_root_of(rows, "absent")
