"""The input half of the prompt panel: a control for each field of `Settings`, and for a picture to start from."""

import copy
import html
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import ipywidgets as widgets
from PIL import Image

from helpers.generate import FROM_IMAGE, STRENGTH, Settings, own_size, resolve, schedulers
from helpers.images import opened
from helpers.preview import to_png
from helpers.prompts import T5_TOKENS, notes

LONGEST = 300  # characters of a sentence that is shown
MANY = 8  # pictures at once


class Controls:
    """`rows` are the widgets; `settings()` is what they say, `restore(settings)` the way back.

    `attempt(work)` is called with what a control sets off and may raise ValueError, one sentence.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, settings: Settings, attempt: Callable[[Callable], None]):
        self.pipe = pipe
        self.start: Image.Image | None = None  # what pictures start from
        self._default = settings
        # Typing is counted in one thread while another one draws, and a tokenizer serves one at a time.
        parts = {name: getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_3")}
        self._reader = SimpleNamespace(**{name: copy.deepcopy(part) for name, part in parts.items()})

        self.prompt, self.prompt_note = _text("Prompt", "What the picture should show"), widgets.HTML()
        self.negative_prompt, self.negative_note = _text("Not wanted", "What it should not show"), widgets.HTML()
        self.negative_prompt.rows = 1
        model = getattr(pipe, "model", None)
        self.examples = widgets.Dropdown(
            options=[("choose one", None), *((text, text) for text in (model.examples if model else ()))],
            description="Examples",
            **_look(full=True),
        )
        self.steps = widgets.IntSlider(description="Steps", min=1, max=50, continuous_update=False, **_look())
        self.guidance = widgets.FloatSlider(
            description="Guidance scale", min=0, max=15, step=0.5, continuous_update=False, **_look()
        )
        height, width = own_size(pipe)
        self.width = widgets.Dropdown(description="Width", options=self._sides("width", width), **_look())
        self.height = widgets.Dropdown(description="Height", options=self._sides("height", height), **_look())
        self.scheduler = widgets.Dropdown(description="Scheduler", options=schedulers(pipe), **_look())
        self.count = widgets.IntSlider(description="Pictures", min=1, max=MANY, continuous_update=False, **_look())
        # Text, not a number box: that one would turn "abc" into 0 without a word.
        self.seed = widgets.Text(description="Seed", **_look())
        self.dice = widgets.Button(description="New seed", icon="random", tooltip="Pick a seed by chance")
        self.random = widgets.Checkbox(description="New seed for each run", indent=False)
        self.random.layout.width = "auto"

        self.start_file = widgets.FileUpload(accept="image/*", description="Start from a picture")
        self.start_file.layout.width = "auto"
        self.start_drop = widgets.Button(description="Start from noise", tooltip="Take the starting picture away")
        self.strength = widgets.FloatSlider(
            description="Strength", min=0.05, max=1, step=0.05, continuous_update=False, **_look()
        )
        self.start_image = widgets.Image(format="png", layout=widgets.Layout(height="64px", width="auto"))

        self._starting = row(self.start_image, self.strength, self.start_drop)
        self.rows = [
            self.prompt,
            self.prompt_note,
            self.negative_prompt,
            self.negative_note,
            *([self.examples] if model else []),
            row(self.steps, self.guidance),
            row(self.width, self.height, self.scheduler, self.count),
            row(self.seed, self.dice, self.random),
            *([row(self.start_file, self._starting)] if type(pipe).__name__ in FROM_IMAGE else []),
        ]
        self.restore(settings)
        self.set_start(None)

        for control in (self.prompt, self.negative_prompt):
            control.observe(lambda _: self._count(), "value")
        self.examples.observe(self._on_example, "value")
        self.dice.on_click(lambda _: self._new_seed())
        self.start_drop.on_click(lambda _: self.set_start(None))
        on_upload(self.start_file, lambda name, content: attempt(lambda: self.set_start(opened(content))))

    def settings(self) -> Settings:
        """What the controls say, unchecked."""
        names = ("prompt", "negative_prompt", "steps", "guidance", "height", "width", "scheduler", "count")
        values = {name: getattr(self, name).value for name in names}
        strength = self.strength.value if self.start is not None else None
        return Settings(**values, seed=self.seed.value.strip(), strength=strength)

    def restore(self, settings: Settings) -> None:
        """Set every control. The settings are ones that can be drawn, as `resolve` returns them."""
        self.prompt.value, self.negative_prompt.value = settings.prompt, settings.negative_prompt
        for name in ("steps", "guidance", "count"):
            slider, value = getattr(self, name), getattr(settings, name)
            slider.max, slider.value = max(slider.max, value), value
        for name in ("width", "height", "scheduler"):
            choice, value = getattr(self, name), getattr(settings, name)
            if value not in choice.options:
                choice.options = (*choice.options, value)
            choice.value = value
        self.seed.value, self.random.value = str(settings.seed), False
        self.strength.value = STRENGTH if settings.strength is None else settings.strength
        self._count()

    def restore_what_fits(self, values: dict) -> list[str]:
        """Set the controls to settings from anywhere; sentences on those that cannot be drawn, which stay the default.

        The seed, say, of a file that asks for a million pixels is as good as any.
        """
        settings, said = self._default, []
        for name in vars(settings):
            value = values.get(name)
            if value is None:
                continue
            try:
                if name == "strength" and not (isinstance(value, (int, float)) and 0 < value <= 1):
                    raise ValueError("The strength is not a number above 0 and up to 1.")
                settings = resolve(self.pipe, replace(settings, **{name: value}))
            except ValueError as error:
                said.append(f"Left out: {error}")
        self.restore(settings)
        return said

    def set_start(self, picture: Image.Image | None) -> None:
        """Let pictures start from this one; None: from noise."""
        self.start = picture
        self._starting.layout.display = "none" if picture is None else None
        if picture is not None:
            small = picture.convert("RGB")
            small.thumbnail((128, 128))
            self.start_image.value = to_png(small)

    def pick_seed(self) -> None:
        """Before a run: another seed, if there is to be one for each."""
        if self.random.value:
            self._new_seed()

    def _new_seed(self) -> None:
        self.seed.value = str(random.randrange(2**32))

    def _sides(self, name: str, own: int) -> list[int]:
        """Lengths in pixels, from half of the model's own to twice it, that can be drawn."""
        found = []
        for quarters in range(2, 9):
            try:
                found.append(getattr(resolve(self.pipe, Settings("x", **{name: own * quarters // 4})), name))
            except ValueError:
                pass
        return found

    def _on_example(self, change) -> None:
        if change["new"] is not None:
            self.prompt.value = change["new"]
            self.examples.value = None  # so that it can be chosen again

    def _count(self) -> None:
        for note, name in ((self.prompt_note, "prompt"), (self.negative_note, "negative_prompt")):
            text = getattr(self, name).value
            used, room = tokens(self._reader, text)
            unseen = notes(self._reader, replace(Settings(""), **{name: text}))
            said = "".join(f"<br>{html.escape(short(sentence))}" for sentence in unseen)
            note.value = (
                f'<div role="status" style="padding-left: 114px"><small>{used} of {room} tokens{said}</small></div>'
            )


def row(*children: widgets.Widget) -> widgets.HBox:
    """Beside each other, on further lines where there is no room."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def tokens(pipe: diffusers.DiffusionPipeline, text: str) -> tuple[int, int]:
    """(tokens of `text`, how many of them the model reads at most), both without those that begin and end it."""
    t5 = getattr(pipe, "tokenizer_3", None)
    tokenizer, limit = (t5, T5_TOKENS) if t5 is not None else (pipe.tokenizer, pipe.tokenizer.model_max_length)
    found = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return len(found), limit - tokenizer.num_special_tokens_to_add()


def on_upload(control: widgets.FileUpload, take: Callable[[str, bytes], None]) -> None:
    """Call `take(name, content)` for a file that is chosen; ipywidgets 7 and 8 hold it in different ways."""

    def changed(change):
        files = change["new"]
        if isinstance(files, dict):  # ipywidgets 7
            files = [{**file, "name": name} for name, file in files.items()]
        if files:
            take(str(files[-1]["name"]), bytes(files[-1]["content"]))

    control.observe(changed, "value")


def short(sentence: str) -> str:
    """A sentence to show, which may quote what somebody typed: 10,000 characters, say."""
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST]} …"


def _text(description: str, placeholder: str) -> widgets.Textarea:
    return widgets.Textarea(description=description, placeholder=placeholder, rows=2, **_look(full=True))


def _look(full: bool = False) -> dict:
    """Labels of one width, so that the controls stand in columns; two beside each other where there is room."""
    width = "auto" if full else "360px"
    return {"style": {"description_width": "110px"}, "layout": widgets.Layout(width=width, max_width="100%")}
