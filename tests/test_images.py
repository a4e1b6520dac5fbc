import io
import json
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, PngImagePlugin

from helpers.generate import Settings
from helpers.images import encoded, grid, opened, record, save, settings, side_by_side, to_image, wrap

SETTINGS = Settings("a red boat; naïve „quotes“ 船\nand a second line", "house", 25, 4.0, 7, 64, 64, "DDIMScheduler", 1)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_settings_come_back_from_the_file(image, tmp_path):
    path = save(image, SETTINGS, tmp_path)
    assert settings(path) == SETTINGS
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert path.parent == tmp_path and path.name.endswith("-7.png")
    text = Image.open(path).info["parameters"]
    assert text.startswith(SETTINGS.prompt) and "Negative prompt: house" in text
    assert "Steps: 25, Sampler: DDIM, CFG scale: 4.0, Seed: 7, Size: 64x64" in text
    assert record(path)["versions"]["torch"] == torch.__version__


def test_a_picture_knows_better_than_the_batch(image, tmp_path):
    image.info.update(settings=Settings("a boat", seed=9), model="tiny")
    path = save(image, Settings("a boat", seed=7, count=3), tmp_path)
    assert settings(path).seed == 9 and record(path)["model"] == "tiny"
    assert settings(save(image, folder=tmp_path)).seed == 9


def with_texts(picture, **texts):
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    picture.save(file, "PNG", pnginfo=chunks)
    return file


def test_a_file_of_another_tool(image, tmp_path):
    text = "a boat\nNegative prompt: tree\nSteps: 9, Sampler: Euler a, Seed: 3, Size: 512x768, Model: m, Clip skip: 2"
    for texts in ({"parameters": text}, {"parameters": text, "settings": "of yet another tool"}):
        (tmp_path / "a.png").write_bytes(with_texts(image, **texts).getvalue())
        assert settings(tmp_path / "a.png") == Settings(
            "a boat", "tree", 9, seed=3, height=768, width=512, scheduler="EulerAncestralDiscreteScheduler"
        )
    found = record(tmp_path / "a.png")
    assert (found["model"], found["versions"], found["others"]) == ("m", {}, {"Clip skip": "2"})


def test_our_json_counts_before_the_text(image):
    prompt = "a boat\nNegative prompt: not one"  # which the text cannot tell from a negative prompt
    file = io.BytesIO(encoded(image, Settings(prompt, "tree", steps=5)))
    assert settings(file) == Settings(prompt, "tree", steps=5)
    assert settings(with_texts(image, parameters=Image.open(file).info["parameters"])).prompt == "a boat"


def test_a_picture_that_was_stopped_says_so(image):
    image.info.update(settings=SETTINGS, stopped_after=4)
    file = io.BytesIO(encoded(image))
    assert record(file)["stopped_after"] == 4
    assert record(io.BytesIO(encoded(Image.open(file))))["stopped_after"] == 4
    assert "stopped_after" not in record(io.BytesIO(encoded(Image.new("RGB", (8, 8)), SETTINGS)))


def file_of(picture, kind="PNG", **more):
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def test_photos_and_drawings_of_somebodys():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    turned = opened(file_of(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif))
    assert turned.size == (20, 30) and turned.mode == "RGB"
    half = opened(file_of(Image.new("RGBA", (8, 8), (255, 0, 0, 128))))
    assert half.getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert opened(file_of(palette, "GIF")).getpixel((0, 0)) == (255, 255, 255)
    deep = opened(file_of(Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16))))
    assert deep.getpixel((0, 0)) == (128, 128, 128)
    for mode in ("L", "1", "CMYK"):
        assert opened(file_of(Image.new(mode, (8, 8)), "TIFF")).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"hello", file_of(Image.effect_noise((64, 64), 9))[:-900]])
def test_uploads_that_are_no_pictures(content):
    with pytest.raises(ValueError, match=r"^The file is not a picture that can be opened: choose a PNG or a JPEG\.$"):
        opened(content)


def test_an_upload_of_100_megapixels():
    large = file_of(Image.new("1", (10_000, 10_000)))
    with pytest.raises(ValueError, match=r"^The picture has 10000 x 10000 pixels: make it smaller, 50 million .*\.$"):
        opened(large)


def test_nothing_is_overwritten(image, tmp_path):
    paths = [save(image, SETTINGS, tmp_path) for _ in range(3)]
    assert len(set(paths)) == 3 == len(list(tmp_path.iterdir()))
    assert save(image, SETTINGS, tmp_path, name="boat").name == "boat.png"
    assert save(image, SETTINGS, tmp_path, name="boat.png").name == "boat-2.png"


@pytest.mark.parametrize("prompt", ["../../x", "/etc/passwd", "..", "a" * 5000, "船", "con\0nul", "~/x $(rm) *?"])
def test_no_prompt_leaves_the_folder(image, tmp_path, prompt):
    folder = tmp_path / "out"
    for path in (save(image, Settings(prompt), folder), save(image, Settings("x"), folder, name=prompt)):
        assert path.resolve().parent == folder and path.suffix == ".png" and len(path.name) < 100
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_nothing(image, tmp_path):
    """A limit on the size of files stands in for a full disk: the same kind of write fails half way."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"not saved in .*: free some space or choose another folder\.") as caught:
            save(image, SETTINGS, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert settings(save(image, SETTINGS, tmp_path)) == SETTINGS


def test_a_read_only_folder_is_one_sentence(image, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nothing is read-only to root
    try:
        with pytest.raises(PermissionError, match=r"not saved in .* \(permission denied\): .* choose another folder"):
            save(image, SETTINGS, folder)
    finally:
        if root:
            os.seteuid(0)
    assert list(folder.iterdir()) == []


def test_pictures_without_settings(image, tmp_path):
    with pytest.raises(ValueError, match="give its settings too"):
        save(image, folder=tmp_path)
    image.save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="plain.png has no settings inside"):
        settings(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="text.png is not a picture"):
        settings(tmp_path / "text.png")
    meta = Image.new("RGB", (8, 8))
    for value in ("nonsense", json.dumps([1]), json.dumps({"settings": {}})):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("settings", value)
        meta.save(tmp_path / "odd.png", pnginfo=chunks)
        with pytest.raises(ValueError, match="has no settings inside"):
            settings(tmp_path / "odd.png")


def test_labels_are_whole():
    font = ImageFont.load_default(15)
    text = "guidance 7.5, a very long label with Donaudampfschifffahrtsgesellschaftskapitän inside"
    lines = wrap(text, font, 160)
    assert all(font.getlength(line) <= 160 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_grid(image):
    plain = grid([image] * 5, columns=3)
    assert plain.size == (3 * 192 + 4 * 8, 2 * 192 + 3 * 8)  # 64 pixels three times as large
    corner = np.asarray(plain)[8:200:3, 8:200:3]
    assert np.array_equal(corner, np.asarray(image))
    labels = ["short", "word " * 30, "b", "c", "d"]
    labelled = grid([image] * 5, columns=3, labels=labels, title="A title " * 20)
    assert labelled.width == plain.width and labelled.height > plain.height + 100
    sheet = np.asarray(labelled.convert("L"))
    assert (sheet[:, -8:] == 255).all() and (sheet[-8:] == 255).all()  # no ink in the margins
    assert side_by_side(image, image.resize((512, 512)), ("left", "right")).width == 2 * 512 + 3 * 8


def test_grid_of_nothing(image):
    with pytest.raises(ValueError, match="no pictures"):
        grid([])
    with pytest.raises(ValueError, match="2 pictures and 1 labels"):
        grid([image, image], labels=["one"])
    with pytest.raises(ValueError, match="at least one column"):
        grid([image], columns=0)


def test_tensor_to_picture():
    tensor = torch.full((2, 3, 4, 6), -1.0)
    tensor[1, 0], tensor[1, 1], tensor[1, 2] = 1.0, 0.0, 7.0
    first, second = to_image(tensor)
    assert first.size == (6, 4) and first.getpixel((0, 0)) == (0, 0, 0)
    assert second.getpixel((5, 3)) == to_image(tensor[1]).getpixel((5, 3)) == (255, 128, 255)
    with pytest.raises(ValueError, match="shape"):
        to_image(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        to_image(torch.full((3, 2, 2), float("nan")))


def test_labels_of_wide_grids_stay_readable():
    """A page shows a grid of large pictures at a third of its size."""
    narrow, wide = (grid([Image.new("RGB", (side, side))] * 4, labels=["boat"] * 4) for side in (256, 1024))
    assert wide.height - 1024 >= 2 * (narrow.height - 256)
