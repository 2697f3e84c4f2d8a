import base64
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vlm_sft_rl.data import images
from vlm_sft_rl.data.images import boxed_size, image_root_of, image_size, locate, open_image, store_image
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


# --- What an image may be ---

GREY = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


def saved(folder, name, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(folder / name, **options)
    return name


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_modes_are_opened_as_pillow_itself_turns_them_into_rgb(tmp_path, mode):
    picture = Image.effect_noise((16, 8), 90).convert("RGB").convert(mode)
    name = saved(tmp_path, "a.png" if mode not in ("CMYK", "YCbCr") else "a.tiff", picture)
    layer = Image.open(tmp_path / name).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert np.abs(np.asarray(open_image(name, tmp_path)).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    opened = np.asarray(open_image(saved(tmp_path, name, GREY), tmp_path))
    assert (opened == (GREY >> 8)[..., None]).all()


def tiff(folder, bits, photometric, data):
    """A grey TIFF of 4 x 2 pixels, written by hand."""
    tags = [
        (256, 4),
        (257, 2),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 122),
        (277, 1),
        (278, 2),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0"
    (folder / "hand.tiff").write_bytes(head + data)
    return open_image("hand.tiff", folder)


def test_grey_tiffs_of_twelve_bits_and_of_white_as_zero(tmp_path):
    values = np.array([[0, 0x400, 0x800, 0xFFF]] * 2)
    high, low = values[:, ::2], values[:, 1::2]
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8).tobytes()
    assert np.asarray(tiff(tmp_path, 12, 1, packed))[0, :, 0].tolist() == [0, 64, 128, 255]
    sixteen = np.array([[0, 0x4000, 0x8000, 0xFFFF]] * 2, dtype="<u2").tobytes()
    assert np.asarray(tiff(tmp_path, 16, 0, sixteen))[0, :, 0].tolist() == [255, 191, 127, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("highest", [1, 255, 70_000])
def test_numbers_without_an_agreed_white_are_refused(tmp_path, dtype, highest):
    name = saved(tmp_path, "a.tiff", np.full((4, 4), highest, dtype=dtype))
    with pytest.raises(RowError, match="nothing says which number is white"):
        open_image(name, tmp_path)
    with pytest.raises(RowError, match="nothing says which number is white"):
        open_image(Image.open(tmp_path / name))


@pytest.mark.parametrize("name", ["a.eps", "a.pdf", "a.ico", "a.tga", "a.jp2"])
def test_formats_that_are_no_photographs_are_not_opened(tmp_path, name):
    with pytest.raises(RowError, match="none of PNG, JPEG"):
        open_image(saved(tmp_path, name, Image.new("RGB", (16, 16))), tmp_path)


def test_the_first_picture_of_several_is_taken_and_that_is_said(tmp_path, caplog):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.tiff", "a.webp", "apng.png"):
        saved(
            tmp_path,
            name,
            pages[0],
            save_all=True,
            append_images=pages[1:],
            **({"lossless": True} if "webp" in name else {}),
        )
        assert open_image(name, tmp_path).getpixel((0, 0)) == (255, 0, 0)
        assert name in caplog.text
    pages[0].save(tmp_path / "a.mpo", save_all=True, append_images=pages[1:])
    caplog.clear()
    open_image("a.mpo", tmp_path)  # a photograph with its preview, as telephones write them
    assert not caplog.text


PNG = io.BytesIO()
Image.new("RGB", (3, 3)).save(PNG, "PNG")
BASE64 = base64.b64encode(PNG.getvalue()).decode()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (BASE64, "base64 text"),
        (f"data:image/png;base64,{BASE64}", "base64 text"),
        ({"bytes": BASE64, "path": None}, "text"),
        ({"bytes": list(PNG.getvalue())}, "list"),
        ({"bytes": None, "path": f"data:image/png;base64,{BASE64}"}, "base64 text"),
        ({"url": "a.png"}, "expected a path"),
        ({"bytes": None, "path": None}, "expected a path"),
        ({}, "expected a path"),
        ([1, 2], "expected a path"),
        ("  ", "expected a path"),
        (None, "expected a path"),
        (True, "expected a path"),
        (b"", "cannot be read"),
        ({"bytes": b"GIF89a"}, "cannot be read"),
        ("x" * 5000, "not a usable path"),
        ("../" * 3000, "usable path|outside"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_one_short_message(tmp_path, item, message):
    for read in (open_image, image_size, boxed_size):
        with pytest.raises(RowError, match=message) as caught:
            read(item, tmp_path)
        assert len(str(caught.value)) < 700
    if isinstance(item, str):
        with pytest.raises(RowError):
            locate(item, tmp_path)


def test_encoded_bytes_are_an_image(tmp_path):
    for item in (
        PNG.getvalue(),
        {"bytes": PNG.getvalue(), "path": "none.png"},
        {"bytes": bytearray(PNG.getvalue())},
    ):
        assert open_image(item, tmp_path).size == image_size(item) == (3, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_cut_files_are_one_message(kind):
    whole = io.BytesIO()
    Image.effect_noise((40, 40), 90).convert("RGB").save(whole, kind)
    for share in (0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.8):
        with pytest.raises(RowError, match=r"cannot be read|damaged or incomplete"):
            open_image(whole.getvalue()[: int(share * len(whole.getvalue()))])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_on_a_picture_that_its_exif_turns(tmp_path, orientation):
    """It is refused unless the size that the row gives can only be the upright one."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name, size in (("oblong.jpg", (12, 8)), ("square.jpg", (8, 8))):
        saved(tmp_path, name, Image.new("RGB", size, "red"), exif=exif)
        for stated in (None, size, size[::-1]):
            upright = size[::-1] if orientation >= 5 else size
            if orientation == 1 or (orientation >= 5 and size != size[::-1] and stated == upright):
                assert boxed_size(name, tmp_path, stated) == open_image(name, tmp_path).size == upright
            else:
                with pytest.raises(RowError, match=f"EXIF orientation {orientation}"):
                    boxed_size(name, tmp_path, stated)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_picture_is_that_of_its_pixels(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (32, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    upright = open_image(f"a.{suffix}", tmp_path).size
    assert upright == ((20, 32) if orientation >= 5 else (32, 20))
    assert image_size(f"a.{suffix}", tmp_path) == upright
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image_size(image) == upright
