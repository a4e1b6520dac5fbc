"""The folder of pictures: what it gives, what it refuses in one sentence, and that it is encoded once."""

import itertools
import json

import pytest
import torch
from PIL import Image

from storybook.world import HELD_OUT, SETTINGS, parse
from storybook.write_dataset import close_ups, in_brief, training_scenes, write
from training.dataset import encode, read, to_square, to_tensor
from training.mini import bundled


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set", 3, size=32)
    return tmp_path / "set"


def captions(folder, **changes):
    path = folder / "captions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_world_writes_what_the_reader_reads(folder):
    paths, texts = read(folder)
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert all(parse(text) for text in texts)
    with pytest.raises(FileExistsError, match="has something in it: name a new folder"):
        write(folder, 3)
    with pytest.raises(ValueError, match="0 pictures are no training set"):
        write(folder / "other", 0)


def test_a_folder_that_was_not_finished_does_not_appear(tmp_path):
    def stopped():
        yield from [next(training_scenes())] * 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", 3, stopped(), size=32)
    assert not (tmp_path / "set").exists()
    write(tmp_path / "set", 3, size=32)
    assert len(read(tmp_path / "set")[0]) == 3 and len(list(tmp_path.iterdir())) == 1


def test_close_ups_show_one_large_thing_and_no_withheld_pair(tmp_path):
    withheld = HELD_OUT | {("red", "boat")}
    scenes = [scene for scene, _ in itertools.islice(close_ups(withheld), 600)]
    things = [thing for scene in scenes for thing in scene.things]
    assert len(things) == len(scenes) and {(thing.size, thing.position) for thing in things} == {("large", "centre")}
    assert len({(thing.colour, thing.kind) for thing in things} - withheld) == 87 and {s.setting for s in scenes} == {
        *SETTINGS
    }
    assert not {(thing.colour, thing.kind) for thing in things} & withheld
    other = next(close_ups(withheld, split="exam"))[0], next(close_ups(settings=("snow",)))[0]
    assert other[0] != scenes[0] and other[1].setting == "snow"
    write(tmp_path / "set", 3, close_ups(), size=32, say=in_brief)
    (first, _), said = next(close_ups()), read(tmp_path / "set")[1]
    seen = parse(said[0])
    assert (seen.things[0].kind, seen.things[0].colour, seen.setting) == (
        first.things[0].kind, first.things[0].colour, first.setting)  # fmt: skip
    assert {thing.size or thing.position for text in said for thing in parse(text).things} == {None}


@pytest.mark.parametrize("text, said", [
    ("{", "is not JSON"),
    ("[]", "has to be an object that names pictures"),
    ("{}", "has to be an object that names pictures"),
])  # fmt: skip
def test_a_captions_file_that_is_none_is_refused(folder, text, said):
    (folder / "captions.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read(folder)


def test_what_is_missing_or_broken_is_named(folder):
    captions(folder, **{"lost.png": "a boat"})
    with pytest.raises(FileNotFoundError, match="^lost.png has a caption, but .* is missing: add it or drop"):
        read(folder)
    (folder / "images/lost.png").write_bytes((folder / "images/00000.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="lost.png cannot be read as a picture: replace it or drop its caption"):
        read(folder)
    for nothing in ("", "  \n", None, 3):
        captions(folder, **{"00001.png": nothing})
        with pytest.raises(ValueError, match="The caption of 00001.png is empty"):
            read(folder)
    with pytest.raises(FileNotFoundError, match="There is no captions.json in"):
        read(folder / "images")


def test_one_picture_and_pictures_without_captions_are_warned_of(folder):
    path = folder / "captions.json"
    path.write_text(json.dumps({"00000.png": "a boat"}))
    with pytest.warns(UserWarning) as told:
        assert len(read(folder)[0]) == 1
    assert [str(one.message).split(" ")[0] for one in told] == ["2", str(folder)]


@pytest.mark.parametrize("mode, side", [("RGB", (90, 40)), ("L", (8, 200)), ("RGBA", (64, 64)), ("P", (33, 65))])
def test_pictures_of_any_size_and_mode_become_squares(tmp_path, mode, side):
    Image.new(mode, side).save(tmp_path / "one.png")
    square = to_square(tmp_path / "one.png", 48)
    assert square.mode == "RGB" and square.size == (48, 48)
    assert square.getpixel((24, 24)) == ((255, 255, 255) if mode == "RGBA" else (0, 0, 0))  # see-through is white


def test_the_middle_is_kept(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    assert (to_tensor([to_square(tmp_path / "wide.png", 30)])[0, 2, :, 2:-2] > 0.99).all()


def test_encoding_happens_once_until_something_changes(folder, monkeypatch):
    parts, calls = bundled("cpu"), []
    monkeypatch.setattr("training.dataset.to_square", lambda *known: calls.append(known) or to_square(*known))
    first = encode(folder, *parts)
    assert first["latents"].shape == (3, 2, 4, 16, 16) and first["text"].shape == (3, 32, 128)
    assert first["empty"].shape == (1, 32, 128) and first["text"].dtype == torch.float16
    again = encode(folder, *parts)
    assert len(calls) == 3 and all(torch.equal(first[name], again[name]) for name in first)
    captions(folder, **{"00000.png": "a red boat"})
    changed = encode(folder, *parts)
    assert len(calls) == 6 and torch.equal(changed["latents"], first["latents"])
    assert not torch.equal(changed["text"][0], first["text"][0]) and torch.equal(changed["text"][1], first["text"][1])
    Image.effect_noise((32, 32), 50).save(folder / "images/00002.png")
    assert not torch.equal(encode(folder, *parts)["latents"][2], first["latents"][2])
    assert not list(folder.rglob("*.partial"))
