"""Generated scenes of four coloured shapes, with questions, answers and captions, in which only the image helps.

A scene has 2 x 2 cells, four of eight colours and a permutation of four shapes: 40,320 scenes, each with a number. All
questions of a level, with their answers and weights, are listed by `every`; questions are drawn from that list and the
bounds of blind baselines are counted over it, so what a text alone or an image alone can reach is exact, not estimated.
`loose_pictures` and `loose_sentences` are further generated pictures and sentences, for pretraining each encoder alone.
numpy and Pillow draw; equal seeds give equal data.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np

from adaptsuite.atomic import write_file
from adaptsuite.errors import UsageError, nearest

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 175),
    "cyan": (60, 210, 220),
    "orange": (240, 135, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
ANSWERS = ("yes", "no", *COLOURS, *SHAPES)
SIDE, CELL = 32, 16  # px of a scene and of one of its cells
NUM_SCENES = 40320  # 8 * 7 * 6 * 5 colours times 4! shapes

NAMES = tuple(COLOURS)
RGB = np.array(list(COLOURS.values()), np.float32)
_COLOUR_ROWS = np.array(list(permutations(range(8), 4)), np.int8)  # (1680, 4)
_SHAPE_ROWS = np.array(list(permutations(range(4))), np.int8)  # (24, 4)
_OCTAL = 8 ** np.arange(3, -1, -1)
_COLOUR_ROW = np.full(8**4, -1)
_COLOUR_ROW[_COLOUR_ROWS @ _OCTAL] = np.arange(1680)
_SHAPE_ROW = np.full(8**4, -1)
_SHAPE_ROW[_SHAPE_ROWS @ _OCTAL] = np.arange(24)
_BESIDE = [1, 0, 3, 2]  # the other position of the same row


# scenes -------------------------------------------------------------------------------------------------------------


def objects(scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(colours, shapes), (N, 4) numbers each in the order of POSITIONS, of scene numbers (N,)."""
    scenes = np.asarray(scenes)
    return _COLOUR_ROWS[scenes // 24], _SHAPE_ROWS[scenes % 24]


def scene_numbers(colours: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The inverse of `objects`. Raises ValueError for a colour or a shape that is there twice."""
    rows, orders = _COLOUR_ROW[colours @ _OCTAL], _SHAPE_ROW[shapes @ _OCTAL]
    if (rows < 0).any() or (orders < 0).any():
        raise ValueError("a scene has four different colours and each of the four shapes once")
    return 24 * rows + orders


def swap_colours(scenes: np.ndarray, first: np.ndarray | int, second: np.ndarray | int) -> np.ndarray:
    """The same scenes with the colours of two positions exchanged: the same words, bound otherwise."""
    colours, shapes = objects(scenes)
    rows, swapped = np.arange(len(colours)), colours.copy()
    swapped[rows, first], swapped[rows, second] = colours[rows, second], colours[rows, first]
    return scene_numbers(swapped, shapes)


SPLITS = ("random", "compositional")


def split(kind: str = "random", seed: int = 0) -> dict[str, np.ndarray]:
    """Scene numbers of train, val and test, without overlap.

    random: 70, 10 and 20 % of all scenes. compositional: four pairs of a colour and a shape are in no scene of train
    and val, and at least one is in every scene of test: red circle, green square, blue triangle, yellow cross.
    """
    if kind not in SPLITS:
        raise UsageError(f"split {kind!r} is unknown; {nearest(kind, SPLITS)}")
    order = np.random.default_rng([seed, 1]).permutation(NUM_SCENES)
    if kind == "random":
        train, val, test = np.split(order, [NUM_SCENES * 7 // 10, NUM_SCENES * 8 // 10])
        return {"train": train, "val": val, "test": test}
    colours, shapes = objects(order)
    held = (colours == shapes).any(1)
    seen = order[~held]
    return {"train": seen[len(seen) // 8 :], "val": seen[: len(seen) // 8], "test": order[held]}


# pictures -----------------------------------------------------------------------------------------------------------

RADII, REACH = (4.25, 5.0, 5.75), 2  # px; offsets from a cell's middle


@cache
def _mask(shape: str, radius: float, dy: float, dx: float, side: int) -> np.ndarray:
    """(side, side) float32 coverage of a shape, each pixel from 4 x 4 samples."""
    at = (np.arange(4 * side, dtype=np.float32) + 0.5) / 4 - side / 2
    u, v = (at - dx)[None] / radius, (at - dy)[:, None] / radius
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= 0.86
    elif shape == "triangle":
        inside = (v <= 0.8) & (v >= 2 * abs(u) - 1)
    else:
        inside = (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)
    return inside.reshape(side, 4, side, 4).mean((1, 3), dtype=np.float32)


@cache
def _masks() -> np.ndarray:
    """(4, variants, CELL, CELL): every shape in every size and place within a cell."""
    around = range(-REACH, REACH + 1)
    places = [(r, dy, dx) for r in RADII for dy in around for dx in around]
    return np.array([[_mask(shape, *place, CELL) for place in places] for shape in SHAPES])


def render(scenes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 3, 32, 32) uint8 pictures; place, size, shade, background and noise are drawn anew each time."""
    colours, shapes = objects(scenes)
    n, masks = len(colours), _masks()
    cover = masks[shapes, rng.integers(0, masks.shape[1], (n, 4))]  # (N, 4, CELL, CELL)
    cover = cover.reshape(n, 2, 2, CELL, CELL).transpose(0, 1, 3, 2, 4)[:, None]  # (N, 1, 2, CELL, 2, CELL)
    paint = RGB[colours] * rng.uniform(0.85, 1.05, (n, 4, 1)).astype(np.float32)
    paint = paint.reshape(n, 2, 2, 3).transpose(0, 3, 1, 2)[:, :, :, None, :, None]
    ground = rng.uniform(60, 130, (n, 1, 1, 1, 1, 1)).astype(np.float32)
    return _developed((ground + cover * (paint - ground)).reshape(n, 3, SIDE, SIDE), rng)


def _developed(picture: np.ndarray, rng: np.random.Generator, noise: float = 10.0) -> np.ndarray:
    picture = picture + noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


# questions and captions ---------------------------------------------------------------------------------------------

LEVELS = (1, 2)
# template and its subjects; a yes/no kind has a colour as its second argument
KINDS = {
    1: {
        "color at": ("what color is the {} ?", POSITIONS),
        "shape at": ("what shape is the {} ?", POSITIONS),
        "is at": ("is the {} {} ?", POSITIONS),
    },
    2: {
        "color of": ("what color is the {} ?", SHAPES),
        "shape of": ("what shape is {} ?", NAMES),
        "color beside": ("what color is beside the {} ?", SHAPES),
        "shape beside": ("what shape is beside the {} ?", SHAPES),
        "is of": ("is the {} {} ?", SHAPES),
    },
}


@cache
def questions(level: int) -> tuple[tuple[str, str], ...]:
    """(kind, text) of every question of a level; a question's number is its position here."""
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is unknown; there is: 1 (by position), 2 (by attribute and relation)")
    found = []
    for kind, (template, subjects) in KINDS[level].items():
        for subject in subjects:
            texts = [template.format(subject, c) for c in NAMES] if "is" in kind.split() else [template.format(subject)]
            found += [(kind, text) for text in texts]
    return tuple(found)


def every(level: int, scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that can be asked about scenes (N,): question and answer numbers (N, Q), and whole-number weights (Q,).

    The kinds of a level are equally frequent, the subjects of a kind too. A yes/no question is true half of the time;
    where it is false, each of the other seven colours is as likely.
    """
    first, start = {}, 0
    for kind, (_, subjects) in KINDS.get(level, {}).items():
        first[kind], start = start, start + len(subjects) * (8 if "is" in kind.split() else 1)
    if not first:
        questions(level)  # says what levels there are
    colours, shapes = (values.astype(np.int64) for values in objects(scenes))
    n = len(colours)
    at = np.argsort(shapes, 1)  # position of each shape
    colour_of = np.take_along_axis(colours, at, 1)  # by shape
    beside = np.array(_BESIDE)[at]
    colour, shape = 2, 2 + len(NAMES)  # first answers of these
    each = np.arange(4)[None].repeat(n, 0)
    columns: list[tuple[np.ndarray, np.ndarray, int]] = []
    if level == 1:
        columns.append((first["color at"] + each, colour + colours, 14))
        columns.append((first["shape at"] + each, shape + shapes, 14))
        subject_colour = colours
    else:
        columns.append((first["color of"] + each, colour + colour_of, 14))
        columns.append((first["shape of"] + colours, shape + shapes, 14))
        columns.append((first["color beside"] + each, colour + np.take_along_axis(colours, beside, 1), 14))
        columns.append((first["shape beside"] + each, shape + np.take_along_axis(shapes, beside, 1), 14))
        subject_colour = colour_of
    truth = first["is at" if level == 1 else "is of"] + 8 * each
    columns.append((truth + subject_colour, np.zeros_like(each), 7))
    for step in range(1, 8):
        columns.append((truth + (subject_colour + step) % 8, np.ones_like(each), 1))
    weights = np.repeat([weight for *_, weight in columns], 4)
    return np.concatenate([q for q, *_ in columns], 1), np.concatenate([a for _, a, _ in columns], 1), weights


def bounds(level: int, scenes: np.ndarray | None = None) -> dict[str, float]:
    """Highest accuracy that a baseline can have which sees the question alone, or the image alone; counted.

    scenes: those that are asked about, equally often; None: all. Of all scenes level 1 has
    (1/8 + 1/4 + 1/2) / 3 = .2917 and 1/6, level 2 (1/8 + 1/4 + 1/8 + 1/3 + 1/2) / 5 = .2667 and 1/10.
    """
    scenes = np.arange(NUM_SCENES) if scenes is None else np.asarray(scenes)
    question, answer, weight = every(level, scenes)
    total, k = len(scenes) * int(weight.sum()), len(ANSWERS)
    counts = np.broadcast_to(weight, question.shape).ravel()

    def best(known: np.ndarray) -> float:
        at = (known * k + answer).ravel()
        table = np.bincount(at, counts, k * (int(known.max()) + 1)).reshape(-1, k)  # whole numbers, exact in float64
        return float(table.max(1).sum() / total)

    return {"text_only": best(question), "image_only": best(np.arange(len(scenes))[:, None])}


@dataclass(frozen=True)
class Asked:
    """N drawn questions."""

    level: int
    scene: np.ndarray  # (N,) scene numbers
    question: np.ndarray  # (N,) positions in questions(level)
    answer: np.ndarray  # (N,) positions in ANSWERS

    @property
    def texts(self) -> list[str]:
        return [questions(self.level)[i][1] for i in self.question]

    @property
    def kinds(self) -> list[str]:
        return [questions(self.level)[i][0] for i in self.question]

    @property
    def answers(self) -> list[str]:
        return [ANSWERS[i] for i in self.answer]


def ask(scenes: np.ndarray, level: int, rng: np.random.Generator) -> Asked:
    """One question about each of the scenes (N,), which may repeat."""
    scenes = np.asarray(scenes)
    question, answer, weight = every(level, scenes)
    column = rng.choice(len(weight), len(scenes), p=weight / weight.sum())
    rows = np.arange(len(scenes))
    return Asked(level, scenes, question[rows, column], answer[rows, column])


def answer_of(scenes: np.ndarray, level: int, question: np.ndarray) -> np.ndarray:
    """(N,) answers to question numbers (N,), -1 where the question is about a colour that the scene lacks."""
    asked, answer, _ = every(level, scenes)
    hit = asked == np.asarray(question)[:, None]
    return np.where(hit.any(1), np.take_along_axis(answer, hit.argmax(1)[:, None], 1)[:, 0], -1)


def captions(scenes: np.ndarray, rng: np.random.Generator) -> list[str]:
    """One caption a scene, its four objects in one of 24 orders; two scenes have no caption in common."""
    colours, shapes = objects(scenes)
    order = rng.permuted(np.arange(4)[None].repeat(len(colours), 0), axis=1)
    words = [[f"{NAMES[c]} {SHAPES[s]} {p}" for c, s, p in zip(cs, ss, POSITIONS, strict=True)]
             for cs, ss in zip(colours, shapes, strict=True)]  # fmt: skip
    return [" , ".join(parts[i] for i in at) for parts, at in zip(words, order, strict=True)]


# files --------------------------------------------------------------------------------------------------------------


def make_dataset(folder: str | Path, rows: int = 600, level: int = 1, kind: str = "random", seed: int = 0) -> Path:
    """Pictures and `questions.jsonl` {image, question, answers, split, group, kind, level}; returns that table's path.

    70 % of the rows are train, 10 % val, 20 % test, each about scenes of its own part; a scene is a group.
    """
    folder, rng, lines = Path(folder), np.random.default_rng([seed, 2]), []
    for part, scenes in _drawn(rows, kind, seed, rng):
        asked = ask(scenes, level, rng)
        names = _pictures(folder, len(lines), scenes, rng)
        for name, scene, text, answer, what in zip(names, scenes, asked.texts, asked.answers, asked.kinds, strict=True):
            row = {"image": name, "question": text, "answers": [answer], "split": part, "group": f"scene-{scene}"}
            lines.append(json.dumps({**row, "kind": what, "level": level}))
    return write_file(folder / "questions.jsonl", "\n".join(lines) + "\n")


def make_captions(folder: str | Path, rows: int = 600, each: int = 5, kind: str = "random", seed: int = 0) -> Path:
    """Pictures and `captions.jsonl` {image, captions, split, group}, `each` captions a picture; returns that table's
    path. Parts and groups are those of `make_dataset`."""
    folder, rng, lines = Path(folder), np.random.default_rng([seed, 4]), []
    for part, scenes in _drawn(rows, kind, seed, rng):
        texts = zip(*[captions(scenes, rng) for _ in range(each)], strict=True)
        names = _pictures(folder, len(lines), scenes, rng)
        for name, scene, own in zip(names, scenes, texts, strict=True):
            own = list(dict.fromkeys(own))  # two may have the same order
            lines.append(json.dumps({"image": name, "captions": own, "split": part, "group": f"scene-{scene}"}))
    return write_file(folder / "captions.jsonl", "\n".join(lines) + "\n")


def _drawn(rows: int, kind: str, seed: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Parts and scene numbers of them."""
    parts = split(kind, seed)
    for part, size in {"train": rows * 7 // 10, "val": rows // 10, "test": rows - rows * 7 // 10 - rows // 10}.items():
        yield part, rng.choice(parts[part], size)


def _pictures(folder: Path, first: int, scenes: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Draws images/NUMBER.png of scenes, counted from `first`; their names."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{first + i:06d}.png" for i in range(len(scenes))]
    for name, picture in zip(names, render(scenes, rng), strict=True):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / name)
    return names


# further pictures and sentences, for pretraining --------------------------------------------------------------------

PATCH = 8  # px of what a token is to tell of
SIZES = ((32, 32), (32, 64), (64, 64), (32, 128))  # height, width


def loose_pictures(
    n: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (N, 3, H, W) uint8 of 1 to 10 objects anywhere, some on panels, of any size and paint.

    Also how much of each patch is of each shape and of each paint, (N, H / 8 * W / 8, 4 + 3), paint being a colour's
    three channels weighted by its cover, and the number of objects of each shape and colour (N, 4 + 8).
    """
    height, width = size
    picture = np.empty((n, height, width, 3), np.float32)
    picture[:] = rng.uniform(20, 240, (n, 1, 1, 1)) + rng.normal(0, 6, (n, 1, 1, 3))
    cover, counts = np.zeros((n, height, width, 7), np.float32), np.zeros((n, 12), np.float32)
    for i in range(n):
        if rng.random() < 0.5:
            _panels(picture[i], rng)
        for _ in range(rng.integers(1, 3 + height * width // 512)):
            shape, colour = int(rng.integers(4)), int(rng.integers(8))
            radius = float(rng.choice((2, 3, 4, 5, 6, 8)))
            side = 2 * int(radius + 2)
            y, x = (
                int(rng.integers(0, height - side + 1)) if height > side else 0,
                int(rng.integers(0, width - side + 1)),
            )
            mask = _mask(SHAPES[shape], radius, 0.0, 0.0, side)[..., None]
            spot = np.s_[i, y : y + side, x : x + side]
            paint = RGB[colour] * rng.uniform(0.8, 1.05)
            picture[spot] += mask * (paint - picture[spot])
            seen = np.concatenate([np.eye(4, dtype=np.float32)[shape], paint / 255])
            cover[spot] += mask * (seen - cover[spot])
            counts[i, [shape, 4 + colour]] += 1
    tokens = cover.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 7).mean((2, 4)).reshape(n, -1, 7)
    return _developed(picture.transpose(0, 3, 1, 2), rng, float(rng.uniform(0, 10))), tokens, counts


def _panels(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Parts the picture into upright panels by gaps of another grey, in place."""
    width = picture.shape[1]
    number = int(rng.integers(1, 4))
    gap = max(int(width * rng.uniform(0.05, 0.14)), 2)
    grey = rng.uniform(20, 240)
    for k in range(1, number):
        x = k * width // number
        picture[:, x - gap // 2 : x + gap // 2 + 1] = grey


GRAMMAR = {
    "opening": (
        "there is {amount} {thing}", "there are {amount} {thing}", "the {place} has {amount} {thing}",
        "there is a {place} with {amount} {thing}", "each {place} contains {amount} {thing}",
        "is there {amount} {thing} in the {place}", "how many {thing} are in the {place}", "what is on the {side}",
        "where is the {thing}", "which {place} has {amount} {thing}",
    ),
    "ending": (
        "", "", "", " touching the edge", " touching the wall", " and {amount} {thing}", " which is not {paint}",
        " on the {side}", " at the {side}", " above {amount} {thing}", " below {amount} {thing}",
        " of the same color", " of different colors",
    ),
    "thing": ("{kind}", "{paint} {kind}", "{paint} {kind}"),
    "kind": (
        "object", "item", "block", "shape", *SHAPES,
        "objects", "items", "blocks", "shapes", "circles", "squares", "triangles", "crosses",
    ),
    "paint": (*NAMES, "black", "grey"),
    "amount": (
        "a", "an", "no", "any", "exactly one", "exactly two", "at least one", "at least two", "at most three",
        "only one", "more than one", "one", "two", "three", "four", "five", "six", "seven", *map(str, range(10)),
    ),
    "place": ("box", "image", "picture", "tower", "corner"),
    "side": ("left", "right", "top", "bottom", "middle", "base"),
}  # fmt: skip


def loose_sentences(n: int, rng: np.random.Generator) -> list[str]:
    """Sentences and questions about no picture in particular: amounts, colours, places."""

    def phrase() -> str:
        text = "{opening}{ending}"
        while "{" in text:
            name = text[text.index("{") + 1 : text.index("}")]
            text = text.replace("{" + name + "}", GRAMMAR[name][int(rng.integers(len(GRAMMAR[name])))], 1)
        return text + (" ?" if text.startswith(("is", "how", "what", "where", "which")) else "")

    return [phrase() for _ in range(n)]


def words() -> tuple[str, ...]:
    """Every word that scenes and loose sentences are made of, sorted."""
    texts = [template for parts in GRAMMAR.values() for template in parts]
    texts += [text for level in LEVELS for _, text in questions(level)] + [",", *NAMES, *SHAPES, *POSITIONS]
    return tuple(sorted({word for text in texts for word in text.split() if "{" not in word}))
