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
from helpers.runner import short

MANY = 8  # pictures at once
LABEL = 110  # pixels, so that the controls stand in columns


class Controls:
    """`rows` are the widgets; `settings()` is what they say, `restore(settings)` the way back.

    `attempt(work)` is called with what a control sets off and may raise ValueError, one sentence.
    """

    def __init__(self, pipe: diffusers.DiffusionPipeline, settings: Settings, attempt: Callable[[Callable], None]):
        self.pipe = pipe
        self.start: Image.Image | None = None  # what pictures start from
        self._default = settings
        self._reader = reader(pipe)

        self.prompt, self.prompt_note = text_area("Prompt", "What the picture should show"), widgets.HTML()
        self.negative_prompt, self.negative_note = text_area("Not wanted", "What it should not show"), widgets.HTML()
        self.negative_prompt.rows = 1
        model = getattr(pipe, "model", None)
        self.examples = widgets.Dropdown(
            options=[("choose one", ""), *((text, text) for text in (model.examples if model else ()))],
            description="Examples",
            **look(full=True),
        )
        self.steps = widgets.IntSlider(description="Steps", min=1, max=50, continuous_update=False, **look())
        self.guidance = widgets.FloatSlider(
            description="Guidance scale", min=0, max=15, step=0.5, continuous_update=False, **look()
        )
        height, width = own_size(pipe)
        self.width = widgets.Dropdown(description="Width", options=self._sides("width", width), **look())
        self.height = widgets.Dropdown(description="Height", options=self._sides("height", height), **look())
        self.scheduler = widgets.Dropdown(description="Scheduler", options=schedulers(pipe), **look())
        self.count = widgets.IntSlider(description="Pictures", min=1, max=MANY, continuous_update=False, **look())
        # Text, not a number box: that one would turn "abc" into 0 without a word.
        self.seed = widgets.Text(description="Seed", **look())
        self.dice = widgets.Button(description="New seed", icon="random", tooltip="Pick a seed by chance")
        self.random = widgets.Checkbox(description="New seed for each run", indent=False)
        self.random.layout.width = "auto"

        self.start_file = widgets.FileUpload(accept="image/*", description="Start from a picture")
        self.start_file.layout.width = "auto"
        self.start_drop = widgets.Button(description="Start from noise", tooltip="Take the starting picture away")
        self.strength = widgets.FloatSlider(
            description="Strength", min=0.05, max=1, step=0.05, continuous_update=False, **look()
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
        if change["new"]:
            self.prompt.value = change["new"]
            self.examples.value = ""  # so that it can be chosen again

    def _count(self) -> None:
        for note, name in ((self.prompt_note, "prompt"), (self.negative_note, "negative_prompt")):
            note.value = counted(self._reader, name, getattr(self, name).value)


def row(*children: widgets.Widget) -> widgets.HBox:
    """Beside each other, on further lines where there is no room."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def reader(pipe: diffusers.DiffusionPipeline) -> SimpleNamespace:
    """The pipeline's tokenizers once more: typing is counted while a thread draws, and one serves one at a time."""
    parts = {name: getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_3")}
    return SimpleNamespace(**{name: copy.deepcopy(part) for name, part in parts.items()})


def counted(pipe: diffusers.DiffusionPipeline | SimpleNamespace, name: str, text: str) -> str:
    """HTML for below a text: how many tokens it has, and what of it the model will not see. `name` is of `Settings`."""
    used, room = tokens(pipe, text)
    unseen = notes(pipe, replace(Settings(""), **{name: text}))
    said = "".join(f"<br>{html.escape(short(sentence))}" for sentence in unseen)
    return below(f"{used} of {room} tokens{said}")


def below(content: str) -> str:
    """HTML in small print, to stand under a control that has a label."""
    return f'<div role="status" style="padding-left: {LABEL + 8}px; line-height: 1.3"><small>{content}</small></div>'


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


def text_area(description: str, placeholder: str) -> widgets.Textarea:
    return widgets.Textarea(description=description, placeholder=placeholder, rows=2, **look(full=True))


def look(full: bool = False) -> dict:
    """Labels of one width; two controls beside each other where there is room."""
    width = "auto" if full else "360px"
    return {"style": {"description_width": f"{LABEL}px"}, "layout": widgets.Layout(width=width, max_width="100%")}
