"""Scenes in words: `caption` writes them, `parse` reads them, `random_scene` makes them up."""

import random
import re
from dataclasses import replace

from storybook.world.shapes import KINDS
from storybook.world.vocabulary import (
    COLOURS,
    INTROS,
    POSITION_PHRASES,
    POSITIONS,
    RELATION_PHRASES,
    RELATIONS,
    SETTING_PHRASES,
    SETTINGS,
    SIZE_PHRASES,
    SIZES,
    Scene,
    Thing,
    allowed_colours,
)


def random_scene(rng: random.Random) -> Scene:
    """A scene of the training distribution: never a `HELD_OUT` pair, some things left unsaid.

    About one scene in three has two things.
    """

    def random_thing(alone):
        kind = rng.choice(tuple(KINDS))
        colour = rng.choice(allowed_colours(kind)) if rng.random() < 0.96 else None
        size = rng.choice(SIZES) if rng.random() < (0.5 if alone else 0.25) else None
        position = rng.choice(POSITIONS) if alone and rng.random() < 0.4 else None
        return Thing(kind, colour, size, position)

    setting = rng.choice(SETTINGS) if rng.random() < 0.92 else None
    if rng.random() < 0.65:
        return Scene((random_thing(True),), setting)
    first, second = random_thing(False), random_thing(False)
    while (first.kind, first.colour) == (second.kind, second.colour):
        second = random_thing(False)
    relation = rng.choice(RELATIONS) if rng.random() < 0.85 else None
    return Scene((first, second), setting, relation)


def _noun_phrase(thing, choose):
    words = [choose(SIZE_PHRASES[thing.size])] if thing.size else []
    words += [thing.colour] if thing.colour else []
    words.append(thing.kind)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def require_known(scene: Scene) -> None:
    """Raise ValueError, in one sentence, for a scene that this world has no words and no pictures for."""
    if not 1 <= len(scene.things) <= 2:
        raise ValueError(f"A scene holds one or two things; this one holds {len(scene.things)}.")
    said = [("setting", scene.setting, SETTINGS), ("relation", scene.relation, RELATIONS)]
    for thing in scene.things:
        if thing.kind not in KINDS:
            raise ValueError(f"There is no thing {thing.kind!r} here: choose one of {', '.join(KINDS)}.")
        said += [("colour", thing.colour, COLOURS), ("size", thing.size, SIZES)]
        said += [("position", thing.position, POSITIONS)]
    for role, value, options in said:
        if value is not None and value not in options:
            raise ValueError(f"There is no {role} {value!r} here: choose one of {', '.join(options)}.")


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words. Without `rng` always the plainest wording, with it one of several.

    Raises ValueError, in one sentence, for a scene of other things than this world has.
    """
    require_known(scene)
    choose = rng.choice if rng else (lambda options: options[0])
    text = _noun_phrase(scene.things[0], choose)
    if len(scene.things) == 2:
        text += f" {choose(RELATION_PHRASES[scene.relation])} {_noun_phrase(scene.things[1], choose)}"
    elif scene.things[0].position:
        text += " " + choose(POSITION_PHRASES[scene.things[0].position])
    intro = choose(INTROS)
    if scene.setting:
        where = choose(SETTING_PHRASES[scene.setting])
        if rng and not intro and rng.random() < 0.15:
            return f"{where}, {text}"
        text += " " + where
    return f"{intro} {text}".strip()


def _phrase_table():
    tables = {
        "size": SIZE_PHRASES,
        "position": POSITION_PHRASES,
        "relation": RELATION_PHRASES,
        "setting": SETTING_PHRASES,
    }
    table = [
        (phrase, role, value)
        for role, options in tables.items()
        for value, phrases in options.items()
        for phrase in phrases
    ]
    table += [(colour, "colour", colour) for colour in COLOURS] + [(kind, "kind", kind) for kind in KINDS]
    table += [(intro, "filler", None) for intro in {*INTROS} - {""}] + [
        (word, "filler", None) for word in ("a", "an", "the")
    ]
    return sorted(table, key=lambda row: -len(row[0].split()))  # the longest phrase wins


_PHRASES = _phrase_table()


def words() -> set[str]:
    """Every word that captions are made of."""
    return {word for phrase, _, _ in _PHRASES for word in phrase.split()}


def _read_phrases(text):
    """(role, value) pairs of the phrases in `text`, and the words that belong to none."""
    words = re.findall(r"[\w-]+", text.lower())
    found, unknown, at = [], [], 0
    while at < len(words):
        for phrase, role, value in _PHRASES:
            parts = phrase.split()
            if words[at : at + len(parts)] == parts:
                found.append((role, value))
                at += len(parts)
                break
        else:
            unknown.append(words[at])
            at += 1
    return found, unknown


def parse(text: str) -> Scene:
    """The scene that a caption describes: `parse(caption(scene, rng)) == scene`.

    Raises ValueError, in one sentence, for words outside this world or a sentence it cannot draw.
    """
    if not isinstance(text, str):
        raise ValueError(f"A caption is text, and not {type(text).__name__}: write it as one string.")
    found, unknown = _read_phrases(text)
    if unknown:
        raise ValueError(f"The storybook world does not know: {', '.join(dict.fromkeys(unknown))}.")
    things, pending, between = [], {}, True
    said = {"relation": [], "setting": [], "position": []}
    for role, value in found:
        if role in ("size", "colour"):
            if role in pending:
                raise ValueError(f"One thing has one {role}; {pending[role]!r} and {value!r} were given.")
            pending[role] = value
        elif role == "kind":
            things.append(Thing(value, **pending))
            pending = {}
        elif role != "filler":
            said[role].append(value)
            between &= role != "relation" or (len(things) == 1 and not pending)
    if pending:
        raise ValueError(f"What is {' and '.join(pending.values())}? Name a thing: {', '.join(KINDS)}.")
    if not things:
        raise ValueError(f"The caption names no thing; it needs one of: {', '.join(KINDS)}.")
    if len(things) > 2:
        raise ValueError(f"A scene holds one or two things; this caption names {len(things)}.")
    for role, values in said.items():
        if len(values) > 1:
            raise ValueError(f"A caption gives one {role}; this one gives {len(values)}.")
    if len(said["relation"]) != len(things) - 1 or not between:
        raise ValueError("Join two things with 'to the left of', 'to the right of', 'above' or 'and' between them.")
    if said["position"]:
        if len(things) == 2:
            raise ValueError("With two things, say how they stand to each other, not where one is.")
        things[0] = replace(things[0], position=said["position"][0])
    setting, relation = (next(iter(said[role]), None) for role in ("setting", "relation"))
    return Scene(tuple(things), setting, relation)
