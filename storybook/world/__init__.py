"""A little flat-design world whose pictures come with the truth about what they show.

A `Scene` holds one or two `Thing`s in a setting. `caption` writes it as a sentence, `parse` reads
the sentence back, `render` draws it and `masks` says where each thing is. Whatever a scene leaves
unsaid (None), the renderer chooses.

The parts in reading order: `vocabulary` (what can be said), `language` (how it is said),
`shapes` (what things look like), `backdrops` (what settings look like), `render` (the picture).
"""

from storybook.world.language import caption, parse, random_scene, words
from storybook.world.render import complete, masks, render, render_with_masks
from storybook.world.shapes import KINDS
from storybook.world.vocabulary import COLOURS, HELD_OUT, POSITIONS, RELATIONS, SETTINGS, SIZES, Scene, Thing

__all__ = [
    "COLOURS", "HELD_OUT", "KINDS", "POSITIONS", "RELATIONS", "SETTINGS", "SIZES", "Scene", "Thing",
    "caption", "complete", "masks", "parse", "random_scene", "render", "render_with_masks", "words",
]  # fmt: skip
