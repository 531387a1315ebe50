"""Generated images: scenes, scans and leaves, from seeded latents.

Two kinds of data share what is at the bottom. For pretraining, a latent says WHAT is seen (a thing's shape, colours,
skin, print and gloss; the tissue of an ultrasound; the lungs of a tomogram), a render says HOW (pose, number, layout,
light, background, exposure, noise): two renders of one latent are a positive pair. For adapters, `make_dataset` draws
leaves of cultivars that differ in six measured traits, with a ceiling that `oracle` computes. Neither kind shows the
other's subjects. numpy and Pillow draw; equal seeds give equal images.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from adaptsuite.manifest import write_csv

BOX, BILINEAR = Image.Resampling.BOX, Image.Resampling.BILINEAR
SKIN = 96  # texels of a thing's skin a side

# latents of pretraining ---------------------------------------------------------------------------------------------

# axes in [0, 1] of each kind; red1 to blue3 are a thing's three colours
AXES = {
    "thing": (
        "package aspect square taper waist lobe2 lobe3 lobe4 lobe5 rough "
        "red1 green1 blue1 red2 green2 blue2 red3 green3 blue3 blush "
        "texture coarse oriented angle stripes stripe_rate spots spot_size "
        "bands logo picture text printed round gloss rim"
    ).split(),
    "ultrasound": "lesions size tall lobed spiky echo edge behind halo layers layer_rate grain fat".split(),
    "tomogram": "opacity count patch sharp low outer net vessels air heart fat".split(),
}
SHARES = {"thing": 0.76, "ultrasound": 0.12, "tomogram": 0.12}
TARGETS = sum(len(axes) for axes in AXES.values())
COLOURS = [(f"red{i}", f"green{i}", f"blue{i}") for i in (1, 2, 3)]
ABSENT = {"stripes": 0.7, "spots": 0.55, "blush": 0.4, "texture": 0.2, "rim": 0.6, "waist": 0.5}  # how often


@dataclass
class Latent:
    """What is seen. `seed` fixes the details that all renders share: the layout of a print, phases of an outline."""

    kind: str
    values: dict[str, float]
    seed: int


def sample_latent(rng: np.random.Generator, kind: str | None = None) -> Latent:
    kind = kind or str(rng.choice(list(SHARES), p=list(SHARES.values())))
    v = dict(zip(AXES[kind], rng.uniform(0, 1, len(AXES[kind])), strict=True))
    if kind == "thing":
        _plausible(v, rng)
    return Latent(kind, v, int(rng.integers(2**31)))


def _plausible(v: dict[str, float], rng: np.random.Generator) -> None:
    """Makes a thing either a package, often light and always printed, or something grown or abstract."""
    v["package"] = float(rng.random() < 0.42)
    for names in COLOURS:
        v.update(zip(names, _colour(rng), strict=True))
    outline = ("lobe2", "lobe3", "lobe4", "lobe5", "rough")
    if v["package"]:
        if rng.random() < 0.45:
            light = rng.uniform(0.75, 1)
            v.update(red1=light, green1=light - rng.uniform(0, 0.08), blue1=light - rng.uniform(0, 0.2))
        v.update(dict.fromkeys(outline, 0.5 * (rng.random() < 0.15)))
        v["printed"] = rng.uniform(0.5, 1)
    else:
        v["printed"] = rng.uniform(0.5, 1) if rng.random() < 0.12 else 0.0
        for name in outline:
            v[name] *= 0.25 if rng.random() < 0.5 else 1
        v["square"] *= 0.2 if rng.random() < 0.5 else 1
    for name, probability in ABSENT.items():
        if rng.random() < probability:
            v[name] = 0.0
    if rng.random() < 0.3:
        v["taper"] = 0.5


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Near grey, or between red and green as what ripens is, or any."""
    kind = rng.random()
    if kind < 0.2:
        return hsv(rng.random(), rng.uniform(0, 0.12), rng.beta(1.5, 1))
    if kind < 0.6:
        return hsv(rng.uniform(-0.06, 0.33), rng.beta(3, 1.3), rng.beta(3, 1.5))
    return hsv(rng.random(), rng.beta(2, 1.2), rng.beta(2.2, 1.2))


def mutate(latent: Latent, rng: np.random.Generator) -> Latent:
    """A near neighbour: two groups of about three axes drawn again, and in half of the cases the details too."""
    other = sample_latent(rng, latent.kind)
    coloured = [name for names in COLOURS for name in names]
    loose = [n for n in latent.values if n not in coloured and n != "package"]
    groups = [list(g) for g in np.array_split(rng.permutation(loose), max(len(loose) // 3, 1))]
    groups += [list(names) for names in COLOURS] if latent.kind == "thing" else []
    drawn = [n for g in rng.choice(len(groups), 2, replace=False) for n in groups[g]]
    values = latent.values | {n: other.values[n] for n in drawn}
    return Latent(latent.kind, values, latent.seed if rng.random() < 0.5 else other.seed)


def targets(latent: Latent) -> np.ndarray:
    """(TARGETS,) axes in [-1, 1], NaN for those of the other kinds."""
    own = [2 * latent.values[n] - 1 if kind == latent.kind else np.nan for kind in AXES for n in AXES[kind]]
    return np.array(own, np.float32)


# things -------------------------------------------------------------------------------------------------------------


class Thing:
    """A latent made ready to be stamped: proportions, outline, and its skin at four sizes."""

    def __init__(self, latent: Latent):
        v, rng = latent.values, np.random.default_rng(latent.seed)
        self.package, self.round, self.gloss, self.rim = v["package"] > 0.5, v["round"], v["gloss"], v["rim"]
        self.power = 3.5 + 8 * v["square"] if self.package else 2 + 2.5 * v["square"] ** 2  # of the superellipse
        ratio = 2 ** ((v["aspect"] - 0.5) * (2.4 if self.package else 1.4)) * (0.75 if self.package else 1)
        self.half = np.array([ratio**0.5, ratio**-0.5])
        self.taper = (v["taper"] - 0.5) * (0.35 if self.package else 0.9)
        self.waist = v["waist"] * (0.1 if self.package else 0.35)
        strength = {k: v[f"lobe{k}"] * (0.10 if k == 2 else 0.12) for k in range(2, 6)}
        strength |= dict.fromkeys((7, 9, 12), 0.03 * v["rough"] if v["rough"] > 0.3 else 0.0)
        phase = rng.uniform(0, 2 * np.pi, len(strength))
        waves = [(k, np.complex64(s * np.exp(1j * p))) for (k, s), p in zip(strength.items(), phase, strict=True)]
        self.lobes = [(k, s) for k, s in waves if abs(s) > 0.01]  # radial harmonics
        skin = Image.fromarray(to_uint8(_skin(v, self.package, rng)))
        if v["printed"] > 0.3:
            skin = _print(skin, v, rng)
        self.skins = [np.asarray(skin.reduce(k), np.float32) / 255 for k in (1, 2, 4, 8)]

    def colour(self, u: np.ndarray, w: np.ndarray, inside: np.ndarray, radius: float, rng) -> np.ndarray:
        """Of the skin at places u, w in [-1, 1]; what is not a package shows any of its sides, curved away."""
        level = int(np.clip(np.log2(SKIN / max(3 * radius, 6)) + 0.5, 0, 3))
        skin = self.skins[level]
        n = len(skin)
        if self.package:
            at = [np.clip((x * 0.5 + 0.5) * n, 0, n - 1).astype(np.int32) for x in (u, w)]
        else:
            bulge = 0.36 * n * (1 + 0.5 * inside * inside)
            at = [
                (x * bulge + shift).astype(np.int32) % n for x, shift in zip((u, w), rng.uniform(0, n, 2), strict=True)
            ]
        return skin[at[1], at[0]]


def _skin(v: dict[str, float], package: bool, rng: np.random.Generator) -> np.ndarray:
    """(SKIN, SKIN, 3): blush, stripes, spots and a texture that is 1/f^a, drawn out, or of one grain."""
    n = SKIN
    one, two, three = (np.array([v[name] for name in names], np.float32) for names in COLOURS)
    y, x = np.mgrid[:n, :n].astype(np.float32) * (2 * np.pi / n)
    texture = _texture(v, rng)
    skin = np.tile(one, (n, n, 1))
    if v["blush"] > 0.05 and not package:
        turn = rng.uniform(0, 2 * np.pi)
        side = np.cos(x - turn) + 0.6 * np.sin(y + turn) + 0.5 * noise(n, rng, 2.5)
        skin += (two - skin) / (1 + np.exp(-3 * (side + 2.4 * v["blush"] - 1.6)))[..., None]
    if v["stripes"] > 0.05:
        wave = np.sin(round(2 + 9 * v["stripe_rate"]) * x + 0.9 * v["texture"] * texture)
        skin += (two - skin) * (v["stripes"] * np.clip(2.5 * wave + 0.5, 0, 1))[..., None]
    if v["spots"] > 0.05:
        grain = noise(n, rng, 0.2 + 2 * v["spot_size"])
        skin += (three - skin) * np.clip(2.5 * (grain - 1.9 + 1.2 * v["spots"]), 0, 1)[..., None]
    return skin + (0.175 * v["texture"] * texture)[..., None] * (0.55 * (two - one) + 0.28)


def _texture(v: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    angle = math.pi * v["angle"]
    down, right = np.fft.fftfreq(SKIN)[:, None], np.fft.rfftfreq(SKIN)
    across = math.cos(angle) * down - math.sin(angle) * right
    f = np.hypot(across * (1 + 5 * v["oriented"] ** 2), math.sin(angle) * down + math.cos(angle) * right) + 1e-4
    power = f ** -(0.6 + 1.6 * v["coarse"])
    if v["oriented"] < 0.5 and v["coarse"] < 0.35:
        power = np.exp(-(np.log(f / (0.04 + 0.3 * v["coarse"])) ** 2) / 0.18)
    return coloured_noise(power, rng)


def _print(skin: Image.Image, v: dict[str, float], rng: np.random.Generator) -> Image.Image:
    """Bands, a picture of blobs, a logo and lines of signs, drawn twice as large."""
    m = 2 * SKIN
    image = skin.resize((m, m), BILINEAR)
    pen = ImageDraw.Draw(image)
    inks = [tuple(int(255 * v[name]) for name in names) for names in COLOURS] + [(250, 250, 248), (20, 20, 26)]
    for _ in range(round(3 * v["bands"])):
        top, wide = m * rng.uniform(0, 1), m * rng.uniform(0.04, 0.35)
        lean = 0 if rng.random() < 0.75 else m * rng.normal(0, 0.3)
        pen.polygon([(0, top), (m, top + lean), (m, top + lean + wide), (0, top + wide)], fill=inks[1])
    if v["picture"] > 0.45:
        x, y, r = m * rng.uniform(0.3, 0.7), m * rng.uniform(0.5, 0.85), m * (0.08 + 0.22 * v["picture"])
        for _ in range(rng.integers(1, 5)):
            (dx, dy), q = rng.normal(0, 0.6 * r, 2), r * rng.uniform(0.4, 0.9)
            box = [x + dx - q, y + dy - q, x + dx + q, y + dy + q * rng.uniform(0.6, 1)]
            pen.ellipse(box, fill=inks[2], outline=inks[rng.integers(5)])
    if v["logo"] > 0.3:
        w, h = m * (0.15 + 0.3 * v["logo"]), m * (0.05 + 0.14 * v["logo"])
        x, y = m * rng.uniform(0.4, 0.6), m * rng.uniform(0.12, 0.4)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape([x - w, y - h, x + w, y + h], fill=inks[2])
        _write(pen, x - 0.7 * w, y - 0.4 * h, 1.4 * w, 0.8 * h, inks[rng.choice([0, 3, 4])], rng)
    for _ in range(round(4 * v["text"])):
        w, h = m * rng.uniform(0.3, 0.8), m * rng.uniform(0.03, 0.11)
        x, y = rng.uniform(0.05 * m, 0.95 * m - w), m * rng.uniform(0.1, 0.9)
        ink = inks[rng.choice([1, 2, 3, 4])]
        for line in range(rng.integers(1, 4)):
            _write(pen, x, y + 1.5 * h * line, w, h, ink, rng)
    return image.reduce(2)


def _write(pen, x: float, y: float, width: float, height: float, ink: tuple, rng: np.random.Generator) -> None:
    """A line of signs that mean nothing."""
    stroke, end, low, middle = max(int(height / 5), 1), x + width, y + height, y + height / 2
    while x < end:
        right = x + height * rng.uniform(0.35, 0.8)
        half = (x + right) / 2
        sign = rng.integers(6)
        paths = (
            [x, y, x, low],
            [x, low, x, y, x, middle, right, middle],
            [],
            [x, y, half, low, right, y],
            [right, y, x, y, x, low, right, low],
            [x, y, right, y, half, y, half, low],
        )
        if sign == 2:
            pen.ellipse([x, y, right, low], outline=ink, width=stroke)
        else:
            pen.line(paths[sign], fill=ink, width=stroke)
        x = right + height * (0.25 if rng.random() < 0.85 else 0.75)


def stamp(
    canvas: np.ndarray,
    thing: Thing,
    place: tuple[float, float],
    radius: float,
    angle: float,
    light: "Light",
    rng: np.random.Generator,
    shadow: float = 0.5,
    lean: float = 0.0,
) -> None:
    """Draws a thing into a (S, S, 3) canvas, in place. lean: perspective; shadow: on what lies beneath."""
    size, (x, y) = len(canvas), place
    reach = radius * max(thing.half) * 1.45
    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 2, size)
    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 2, size)
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    c, s = math.cos(angle), math.sin(angle)
    px, py = (np.arange(x0, x1, dtype=np.float32) - x) / radius, (np.arange(y0, y1, dtype=np.float32) - y) / radius
    u, w = c * px + s * py[:, None], c * py[:, None] - s * px
    if lean:
        u, w = u / (1 + lean * u), w / (1 + lean * u)
    u, w = u / thing.half[0], w / thing.half[1]
    u = u / np.maximum(1 + thing.taper * w - thing.waist * np.exp(-8 * (w + 0.25) ** 2), 0.3)
    q = np.maximum((np.abs(u) ** thing.power + np.abs(w) ** thing.power) ** np.float32(1 / thing.power), 1e-4)
    if thing.lobes:
        z = (u + 1j * w).astype(np.complex64)
        z /= np.abs(z) + 1e-6
        q = q / np.maximum(1 + sum((z**k * a).real for k, a in thing.lobes), 0.2)
    scale = radius * float(thing.half.min())
    edge = (1 - q) * scale  # px to the outline, roughly
    patch = canvas[y0:y1, x0:x1]
    dark = np.clip(1 + edge / (0.28 * scale + 1), 0, 1)
    patch *= (1 - shadow * dark * dark)[..., None]
    inside = np.minimum(q, 1)
    colour = thing.colour(u, w, inside, radius, rng)
    if thing.package:
        bend = 0.35 * thing.round
        normal = bend * u, np.zeros_like(u), np.sqrt(np.maximum(1 - (bend * u) ** 2, 0.05))
    else:
        bend = 0.45 + 0.55 * thing.round
        dome = np.maximum(np.sqrt(1 - 0.98 * inside * inside), 0.05)
        normal = bend * u, bend * w, dome * bend + 1 - bend
    lx, ly, lz = c * light.way[0] + s * light.way[1], c * light.way[1] - s * light.way[0], light.way[2]
    length = np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)
    lit = (normal[0] * lx + normal[1] * ly + normal[2] * lz) / length
    shade = light.ambient + light.strength * np.maximum(lit, 0)
    shade = shade * (1 - 0.5 * thing.rim * np.clip((inside - 0.8) * 5, 0, 1))
    colour = colour * shade[..., None]
    if thing.gloss > 0.2:
        mirrored = np.maximum(2 * lit * normal[2] / length - lz, 0)
        colour += ((0.25 if thing.package else 0.75) * thing.gloss * mirrored ** (6 + 40 * thing.gloss))[..., None]
    patch += (colour - patch) * np.clip(edge + 0.5, 0, 1)[..., None]


@dataclass
class Light:
    way: np.ndarray  # towards it, (3,), of length 1
    ambient: float
    strength: float


# scenes -------------------------------------------------------------------------------------------------------------


class Painter:
    """Renders latents as (size, size, 3) uint8. Earlier pictures stand behind later ones, so their order matters."""

    def __init__(self, size: int, rng: np.random.Generator, memory: int = 48):
        self.size, self.rng, self.memory = size, rng, memory
        self.past: list[np.ndarray] = []

    def views(self, latent: Latent, count: int = 2) -> np.ndarray:
        """(count, size, size, 3) renders of one latent."""
        if latent.kind != "thing":
            draw = ultrasound if latent.kind == "ultrasound" else tomogram
            return np.stack([to_uint8(draw(latent, self.size, self.rng)) for _ in range(count)])
        thing, out = Thing(latent), []
        for _ in range(count):
            out.append(to_uint8(self._expose(self._scene(thing))))
            if len(self.past) == self.memory:
                self.past.pop(int(self.rng.integers(self.memory)))
            self.past.append(out[-1])
        return np.stack(out)

    def _scene(self, thing: Thing) -> np.ndarray:
        """One thing, held or not; a few; a heap, maybe to the edge of its crate; shelves of packages."""
        rng, n = self.rng, self.size
        light = sample_light(rng)
        layout = rng.choice(4, p=[0.5, 0.14, 0.06, 0.30] if thing.package else [0.22, 0.16, 0.62, 0.0])
        turn = rng.normal(0, 0.28) if thing.package else rng.uniform(0, 2 * np.pi)
        loose = 0.12 if thing.package else rng.choice([0.25, 3.0])
        canvas = self._background(soft=layout < 2)
        if layout == 0:
            radius = n * rng.uniform(0.26, 0.48) / max(thing.half) ** 0.5
            place = n / 2 + rng.normal(0, 0.1 * n, 2)
            grip = rng.random()
            if grip < 0.4:
                _arm(canvas, place, radius, rng)
            stamp(canvas, thing, place, radius, turn, light, rng, 0.4, rng.normal(0, 0.08))
            if 0.25 < grip < 0.55:
                _fingers(canvas, place, radius, thing.half[0], rng)
        elif layout == 1:
            for _ in range(rng.integers(2, 6)):
                radius, place = n * rng.uniform(0.14, 0.26), rng.uniform(0.1 * n, 0.9 * n, 2)
                stamp(canvas, thing, place, radius, turn + rng.normal(0, loose), light, rng)
        elif layout == 2:
            canvas *= rng.uniform(0.15, 0.6)
            radius = n * rng.choice([rng.uniform(0.085, 0.13), rng.uniform(0.12, 0.26)])
            for place in _heap(n, radius, rng):
                own = turn + rng.normal(0, loose)
                stamp(canvas, thing, place, radius * rng.uniform(0.88, 1.12), own, light, rng, 0.55)
        else:
            canvas = _shelves(canvas * rng.uniform(0.3, 1), thing, light, rng)
        if rng.random() < 0.1:  # a lamp in the glass
            y, x = np.mgrid[:n, :n].astype(np.float32) / n
            way = rng.uniform(0, np.pi)
            off = (x - rng.random()) * math.cos(way) + (y - rng.random()) * math.sin(way)
            canvas = canvas + rng.uniform(0.1, 0.5) * np.exp(-((off / rng.uniform(0.03, 0.15)) ** 2))[..., None]
        return canvas

    def _background(self, soft: bool) -> np.ndarray:
        """A part of an earlier picture, a rough or plain wall, or edges of boards."""
        rng, n = self.rng, self.size
        kind = rng.random()
        if kind < 0.62 and len(self.past) > 7:
            image, part = Image.fromarray(self.past[rng.integers(len(self.past))]), rng.uniform(0.5, 1) * n
            left, top = rng.uniform(0, n - part, 2)
            image = image.resize((n, n), BILINEAR, (left, top, left + part, top + part))
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if soft:
                image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3)))
            back = np.asarray(image, np.float32) / 255 * rng.uniform(0.35, 1)
            return back + (back.mean() - back) * rng.uniform(0, 0.5)
        back = np.tile(hsv(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.05, 0.95)), (n, n, 1))
        if kind < 0.9:
            back *= (1 + rng.uniform(0.02, 0.3) * noise(n, rng, rng.uniform(0.8, 2.4)))[..., None]
        if rng.random() < 0.4:
            for at in rng.integers(0, n, rng.integers(1, 4)):
                back[at : at + rng.integers(2, 9)] = hsv(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.1, 0.95))
            back = back if rng.random() < 0.5 else np.ascontiguousarray(back.transpose(1, 0, 2))
        return back

    def _expose(self, canvas: np.ndarray) -> np.ndarray:
        """Uneven light, exposure, white balance, gamma, blur, noise."""
        rng, n = self.rng, self.size
        y, x = np.mgrid[:n, :n].astype(np.float32) / n - 0.5
        way, slope, corner = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        canvas = canvas * (1 + slope * (x * math.cos(way) + y * math.sin(way)) - corner * (x * x + y * y))[..., None]
        balance = 1 + rng.normal(0, 0.05) * np.array([1, 0.1, -1], np.float32)
        metered = (0.42 / max(float(canvas.mean()), 0.05)) ** 0.6  # as a camera would, in part
        canvas = np.clip(canvas * (metered * 2 ** rng.normal(0, 0.25) * balance), 0, 1.2)
        canvas = canvas ** np.float32(2 ** rng.normal(0, 0.25))
        if rng.random() < 0.3:
            canvas = _blurred(canvas, rng.uniform(0.3, 1))
        return canvas + rng.normal(0, rng.uniform(0.003, 0.03), canvas.shape)


def sample_light(rng: np.random.Generator) -> Light:
    turn, up, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.95), rng.uniform(0.4, 0.9)
    flat = math.sqrt(1 - up**2)
    way = np.array([flat * math.cos(turn), flat * math.sin(turn), up])
    return Light(way, rng.uniform(0.95, 1.1) - 0.85 * strength, strength)


def _heap(n: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) places that fill the picture, or its part inside a crate."""
    step = radius * rng.uniform(1.1, 1.6)
    x, y = np.meshgrid(np.arange(-step, n + step, step), np.arange(-step, n + step, 0.9 * step))
    x[1::2] += step / 2
    places = np.stack([x.ravel(), y.ravel()], 1) + rng.normal(0, 0.22 * step, (x.size, 2))
    if rng.random() < 0.4:
        way = rng.uniform(0, 2 * np.pi)
        places = places[(places - n / 2) @ [math.cos(way), math.sin(way)] < n * rng.uniform(0.1, 0.5)]
    return rng.permutation(places) if rng.random() < 0.5 else places


def _shelves(canvas: np.ndarray, thing: Thing, light: Light, rng: np.random.Generator) -> np.ndarray:
    """Rows of one package on boards with price tags, mostly seen askew."""
    n = len(canvas)
    radius = n * rng.uniform(0.13, 0.34) / thing.half[1]
    wide, tall = 2 * radius * thing.half[0] * rng.uniform(1.0, 1.12), 2 * radius * thing.half[1]
    gap = rng.uniform(0.1, 0.3) * tall
    board = hsv(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.5, 0.95))
    for y in np.arange(rng.uniform(-tall, 0), n + tall, tall + gap):
        shift = rng.uniform(0, wide)
        for x in np.arange(shift - wide, n + wide, wide):
            own, lean = radius * rng.uniform(0.97, 1.03), rng.normal(0, 0.02)
            stamp(canvas, thing, (x, y), own, rng.normal(0, 0.02), light, rng, 0.3, lean)
        edge = int(y + tall / 2)
        if 0 <= edge < n:
            canvas[edge : edge + max(int(0.6 * gap), 1)] = board
            for x in np.arange(shift, n, 2 * wide).astype(int):
                canvas[edge : edge + max(int(0.5 * gap), 1), x : x + int(0.5 * wide)] = rng.choice([0.95, 0.9, 0.7])
    if rng.random() < 0.4:
        return canvas
    angle, zoom, m = rng.normal(0, 0.25), rng.uniform(0.7, 0.95), n / 2
    c, s = zoom * math.cos(angle), zoom * math.sin(angle)
    warp = (c, -s, m - c * m + s * m, s, c, m - s * m - c * m, *(rng.normal(0, 0.15, 2) / n))
    image = Image.fromarray(to_uint8(canvas))
    image = image.transform((n, n), Image.Transform.PERSPECTIVE, warp, BILINEAR, fillcolor=(60, 58, 55))
    return np.asarray(image, np.float32) / 255


def _arm(canvas: np.ndarray, place: np.ndarray, radius: float, rng: np.random.Generator) -> None:
    way = rng.normal(2.3, 0.4)
    way = np.array([math.cos(way), math.sin(way)])
    _limb(canvas, place + 0.6 * radius * way, place + 3 * radius * way, 0.42 * radius, _flesh(rng))


def _fingers(canvas: np.ndarray, place: np.ndarray, radius: float, half: float, rng: np.random.Generator) -> None:
    flesh, side = _flesh(rng), rng.choice([-1, 1])
    for k in range(rng.integers(1, 5)):
        start = place + radius * np.array([side * half, 0.3 * k - 0.1])
        end = start - radius * np.array([side * rng.uniform(0.3, 0.7), 0.1])
        _limb(canvas, start, end, 0.13 * radius, flesh)


def _flesh(rng: np.random.Generator) -> np.ndarray:
    return hsv(rng.uniform(0.02, 0.07), rng.uniform(0.25, 0.6), rng.uniform(0.35, 0.95))


def _limb(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, width: float, colour: np.ndarray) -> None:
    y, x = np.mgrid[: len(canvas), : len(canvas)].astype(np.float32)
    dx, dy = end - start
    t = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1)
    off = np.hypot(x - start[0] - t * dx, y - start[1] - t * dy)
    lit = colour * (0.55 + 0.5 * np.sqrt(np.clip(1 - (off / width) ** 2, 0, 1)))[..., None]
    canvas += (lit - canvas) * np.clip(width - off + 0.5, 0, 1)[..., None]


# scans --------------------------------------------------------------------------------------------------------------


def ultrasound(latent: Latent, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, n, 3): layers, fat lobules and lesions under speckle, with what they throw behind them."""
    v, detail = latent.values, np.random.default_rng(latent.seed)
    y, x = np.mgrid[:n, :n].astype(np.float32) / n
    bend = rng.uniform(0.01, 0.05) * noise(n, rng, 2.4)
    rows, columns = ((y + bend) * n).astype(np.int32) % n, np.broadcast_to(np.arange(n), (n, n))
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n) * (3 + 7 * v["layers"])) + 1e-4
    layers = coloured_noise(np.exp(-(np.log(f / (0.03 + 0.09 * v["layer_rate"])) ** 2) / 0.7), rng)[rows, columns]
    lines = np.exp(-4 * np.abs(layers)) * np.clip(noise(n, rng, 1.8) + 0.6, 0, 2)
    tissue = 0.26 + 0.05 * layers + 0.45 * v["layers"] * lines + 0.05 * noise(n, rng, 1.2)
    tissue *= 1 - 0.5 * v["fat"] * np.clip(noise(n, rng, 2.0)[rows, columns], 0, 1)
    tissue = np.where(y + bend < rng.uniform(0.03, 0.3), 0.7 * tissue + 0.14, tissue)
    tissue = np.where(y < rng.uniform(0.01, 0.05), 0.6, tissue)
    for _ in range(int(v["lesions"] > 0.2) + int(v["lesions"] > 0.75)):
        cx, cy = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.6)
        r, tall = 0.06 + 0.2 * v["size"] * rng.uniform(0.85, 1.15), 2 ** (0.45 * (v["tall"] - 0.65))
        z = ((x - cx) * tall / r + 1j * (y + 0.3 * bend - cy) / (tall * r)).astype(np.complex64)
        q = np.abs(z) + 1e-5
        z, outline = z / q, 1.0
        for k in (2, 3, 4, 5, 8, 11, 15, 19):
            a = 0.16 * v["lobed"] / k**0.5 if k < 6 else 0.07 * v["spiky"] ** 2
            outline = outline + (np.complex64(a * detail.normal() * np.exp(2j * np.pi * detail.random())) * z**k).real
        q = q / np.maximum(outline, 0.3)
        inner = 0.01 + 0.28 * v["echo"] * (1 + 0.35 * noise(n, rng, 1.2))
        tissue += (inner - tissue) * np.clip((1 - q) / (0.04 + 0.45 * (1 - v["edge"])) + 0.5, 0, 1)
        tissue += 0.3 * v["halo"] * np.exp(-(((q - 1.1) / 0.1) ** 2))
        beam = np.exp(-(((x - cx) / (0.8 * r)) ** 4)) * np.clip((y - cy - 0.6 * r) / (0.4 * r), 0, 1)
        tissue *= np.exp((2.8 * v["behind"] - 1.8) * beam)  # a shadow, or brighter than beside it
    gain = np.exp(-rng.uniform(0, 2) * y) * rng.uniform(0.9, 1.7)
    for _ in range(rng.integers(0, 3)):  # poor contact
        gain *= 1 - rng.uniform(0, 0.5) * np.exp(-(((x - rng.random()) / rng.uniform(0.03, 0.15)) ** 2))
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    smooth = np.exp(-2 * (np.pi * f * (0.5 + 0.9 * v["grain"])) ** 2)
    speckle, share = np.hypot(coloured_noise(smooth, rng), coloured_noise(smooth, rng)), rng.uniform(0.15, 0.45)
    picture = np.maximum(tissue * gain * (1 - share + share * speckle / speckle.mean()), 0) ** rng.uniform(0.75, 1.15)
    if rng.random() < 0.5:
        picture[:, : rng.integers(0, 6)] = 0
        picture[n - rng.integers(1, 8) :] = 0
    return np.repeat(picture[..., None], 3, 2)


def tomogram(latent: Latent, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, n, 3): a slice of a chest, in a window: lungs with vessels and opacities, heart, bones, table."""
    v = latent.values
    y, x = np.mgrid[:n, :n].astype(np.float32) / n * 2 - 1
    angle, zoom = rng.normal(0, 0.06), rng.uniform(0.72, 1.12)
    c, s, shift = zoom * math.cos(angle), zoom * math.sin(angle), rng.normal(0, 0.04, 2)
    y, x = c * y - s * x + shift[0], s * y + c * x + shift[1]
    w, h = rng.uniform(0.85, 0.98), rng.uniform(0.66, 0.92)

    def blob(cx: float, cy: float, rx: float, ry: float, power: float = 2.3) -> tuple[np.ndarray, np.ndarray]:
        q = (np.abs((x - cx) / rx) ** power + np.abs((y - cy) / ry) ** power) ** (1 / power)
        return np.clip(15 * (1 - q) * min(rx, ry) + 0.5, 0, 1), q

    fat = 0.03 + 0.1 * v["fat"]
    body, _ = blob(0, 0, w, h, 2.6)
    inner, depth = blob(0, 0, w - fat, h - fat, 2.6)
    density = -1.0 + 0.9 * body  # thousands of Hounsfield units
    density += (0.05 + 0.03 * noise(n, rng, 0.8) - density) * inner
    wave = np.sin(np.arctan2(y / h, x / w) * rng.integers(5, 9) + rng.uniform(0, 6))
    density += (0.6 - density) * np.exp(-(((depth - 0.93) / 0.04) ** 2)) * (wave > 0.2) * body  # ribs
    lungs, size = np.zeros((n, n), np.float32), rng.uniform(0.8, 1.1)
    for side in (-1, 1):
        rx, ry = 0.36 * w * size * rng.uniform(0.9, 1.05), 0.7 * h * size
        lungs = np.maximum(lungs, blob(0.46 * side * w, rng.normal(-0.03, 0.03), rx, ry, 2.4)[0])
    heart = 0.2 + 0.2 * v["heart"]
    lungs *= 1 - blob(rng.normal(0.10, 0.05), rng.normal(-0.08, 0.06), heart * w, (heart + 0.02) * h, 2.1)[0]
    empty = -0.82 + 0.12 * (1 - v["air"])
    lung = empty + 0.03 * noise(n, rng, 1.0)
    lung -= 0.85 * lung * _vessels(n, v["vessels"], w, rng)
    if v["opacity"] > 0.3:
        place, rough = np.zeros((n, n), np.float32), (0.12 + 0.18 * v["count"]) * noise(n, rng, 1.6)
        for _ in range(1 + int(5 * v["count"])):
            r = (0.08 + 0.3 * v["patch"]) * rng.uniform(0.6, 1.3)
            cx = rng.choice([-1, 1]) * w * (0.3 + 0.35 * v["outer"] * rng.uniform(0.6, 1.1))
            cy = (0.78 * v["low"] - 0.36) * h + rng.normal(0, 0.15)
            away = np.hypot((x - cx) / r, (y - cy) / (r * rng.uniform(0.6, 1.4))) + rough
            place = np.maximum(place, np.clip((1 - away) * (0.8 + 5 * v["sharp"]), 0, 1))
        dense = empty + (0.15 + 0.65 * v["opacity"]) * (1 + 0.25 * v["net"] * noise(n, rng, 0.4))
        lung += np.maximum(dense - lung, 0) * place
    density += (lung - density) * lungs
    density += (0.5 + 0.1 * noise(n, rng, 1.0) - density) * blob(0, 0.62 * h, 0.11, 0.12)[0]  # spine
    if rng.random() < 0.6:
        density += (-0.95 - density) * blob(rng.normal(0, 0.02), -0.12, 0.035, 0.045)[0]  # windpipe
    if rng.random() < 0.5:
        table = np.abs(y - h - rng.uniform(0.06, 0.12) + 0.06 * x * x * rng.choice([-1, 1]))
        density += (-0.3 - density) * np.clip(1.5 - table * n / 2, 0, 1) * (np.abs(x) < 0.9)
    lungs_shown = rng.random() < 0.8
    centre, width = (rng.normal(-0.55, 0.12), rng.uniform(1.1, 1.8)) if lungs_shown else (0.05, rng.uniform(0.35, 1.2))
    picture = _blurred(np.clip((density - centre) / width + 0.5, 0, 1), rng.uniform(0.3, 0.9))
    picture = picture + rng.normal(0, rng.uniform(0.004, 0.04), picture.shape)
    if rng.random() < 0.1:
        picture = picture * rng.uniform(0.5, 1) + rng.uniform(0, 0.2)
    return np.repeat(picture[..., None], 3, 2)


def _vessels(n: int, amount: float, width: float, rng: np.random.Generator) -> np.ndarray:
    """(n, n) in [0, 1]: branches that leave the middle and thin out, and dots where others cross the slice."""
    tree = Image.new("L", (2 * n, 2 * n))
    pen = ImageDraw.Draw(tree)
    for side in (-1, 1):
        for _ in range(int(3 + 9 * amount)):
            at = np.array([0.16 * side * width + rng.normal(0, 0.03), rng.normal(0, 0.08)])
            way, wide = (0 if side > 0 else math.pi) + rng.normal(0, 0.9), rng.uniform(0.02, 0.05)
            for _ in range(7):
                end = at + 0.08 * np.array([math.cos(way), math.sin(way)])
                pen.line([*((at + 1) * n), *((end + 1) * n)], fill=230, width=max(int(wide * n), 1))
                at, way, wide = end, way + rng.normal(0, 0.35), 0.78 * wide
    for _ in range(int(10 + 60 * amount)):
        (x, y), r = rng.uniform(0, 2 * n, 2), rng.uniform(0.4, 1.6)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=200)
    return _array(tree.reduce(2))


# cultivars ----------------------------------------------------------------------------------------------------------

TRAITS = ("vein_count", "vein_angle", "curvature", "tooth_count", "tooth_depth", "asymmetry")
# a trait of 0 and one sigma of it: pairs of veins, degrees, degrees, teeth a side, share of the length, of the width
_LOOKS = ((9.0, 1.4), (50.0, 7.0), (0.0, 24.0), (42.0, 4.5), (0.0065, 0.0012), (0.0, 0.09))


@dataclass(frozen=True)
class Species:
    """Macro shape and hue: what all cultivars of a species share."""

    width: float  # half the width over the length
    base: float  # exponent of the outline at the stalk: small is round
    tip: float  # exponent at the tip: large is drawn out
    hue: float
    saturation: float
    value: float


def sample_species(index: int, seed: int = 0) -> Species:
    """Species of one seed are spread over width and hue; the first ones are green."""
    rng = np.random.default_rng([seed, index, 11])
    place = (index * 0.618 + rng.uniform(0, 0.1)) % 1
    hue = (0.24 + 0.18 * place) if index % 4 < 3 else (0.92 + 0.2 * place)
    base, tip = rng.uniform(0.4, 0.9), rng.uniform(0.55, 1.15)
    return Species(0.23 + 0.15 * ((place * 3) % 1), base, tip, hue, rng.uniform(0.45, 0.75), rng.uniform(0.42, 0.62))


def cultivar_means(cultivars: int, separation: float, seed: int = 0) -> np.ndarray:
    """(cultivars, 6) in units of the deviation within a cultivar: normal of deviation `separation`."""
    return np.random.default_rng([seed, 12]).normal(0, separation, (cultivars, len(TRAITS)))


def oracle(
    cultivars: int = 40,
    separation: float = 1.6,
    seed: int = 0,
    species: int = 1,
    shots: int | None = None,
    leaves: int = 400,
) -> float:
    """The ceiling of the task that `make_dataset` draws with these arguments: accuracy of the Bayes classifier that is
    told the six latents and the species of a leaf instead of its picture, by Monte Carlo over `leaves` a cultivar.

    It knows the means of the cultivars, and the noise about them is the unit normal, so it takes the nearest mean of
    the leaf's species. With shots it knows only the latents of that many leaves of each cultivar, drawn anew for each
    test leaf's turn, and the normal that means come from: the nearest posterior mean.
    """
    rng, means = np.random.default_rng([seed, 13]), cultivar_means(cultivars, separation, seed)
    own = np.arange(cultivars) % species
    hits = 0
    for _ in range(leaves):
        known = means
        if shots is not None:
            seen = means + rng.normal(0, 1, means.shape) / np.sqrt(shots)
            known = seen * shots / (shots + separation**-2)
        test = means + rng.normal(0, 1, means.shape)
        distance = ((test[:, None] - known) ** 2).sum(2)
        distance[own[:, None] != own] = np.inf
        hits += int((distance.argmin(1) == np.arange(cultivars)).sum())
    return hits / (leaves * cultivars)


def make_dataset(
    folder: Path | str,
    cultivars: int = 40,
    shots: int = 3,
    tests: int = 10,
    separation: float = 1.6,
    size: int = 96,
    seed: int = 0,
    species: int = 1,
) -> Path:
    """PNG files of leaves of `cultivars` cultivars, spread over `species` species, and the path of their manifest.csv:
    path, label, split (train: `shots` a cultivar, test: `tests`), group (the leaf), species, the six latents.

    A cultivar is the mean of six latents, `separation` times as wide spread as leaves are within it; pose, light and
    ground say nothing of it. Mirroring a leaf turns the sign of its curvature and asymmetry. The teeth cannot be told
    at 96 px and can at 224. `oracle` has the ceiling. Equal arguments give equal files, and other `size` or `tests` the
    same leaves, drawn larger or more of them.
    """
    folder, means = Path(folder), cultivar_means(cultivars, separation, seed)
    kinds = [sample_species(i, seed) for i in range(species)]
    rows = []
    for k in range(cultivars):
        label = f"species{k % species}-cultivar{k // species:02d}"
        (folder / label).mkdir(parents=True, exist_ok=True)
        for leaf in range(shots + tests):
            rng = np.random.default_rng([seed, k, leaf])
            latents = means[k] + rng.normal(0, 1, len(TRAITS))
            name = f"{label}/{label}-{leaf:03d}.png"
            draw_leaf(kinds[k % species], latents, size, rng).save(folder / name)
            split = "train" if leaf < shots else "test"
            row = {"path": name, "label": label, "split": split, "group": f"{label}-{leaf:03d}"}
            row |= {"species": f"species{k % species}"}
            rows.append(row | {n: f"{v:.4f}" for n, v in zip(TRAITS, latents, strict=True)})
    write_csv(folder / "manifest.csv", rows)
    return folder / "manifest.csv"


def visible(latents: np.ndarray) -> dict[str, float]:
    """What six latents in sigma look like, in the units of _LOOKS; they saturate softly beyond four."""
    bent = 5 * np.tanh(np.asarray(latents) / 5)
    return {name: at + one * z for name, (at, one), z in zip(TRAITS, _LOOKS, bent, strict=True)}


def draw_leaf(kind: Species, latents: np.ndarray, size: int, rng: np.random.Generator) -> Image.Image:
    """(size, size) RGB. The outline and the veins are drawn four (above 256 px two) times as large, then averaged."""
    look, fine = visible(latents), (4 if size <= 256 else 2) * size
    thick, length = fine / 96, fine * rng.uniform(0.66, 0.76)
    t = np.linspace(0, 1, 241)
    heading = rng.uniform(-0.6, 0.6) - np.pi / 2 + np.deg2rad(look["curvature"]) * (t - 0.5)
    along = np.stack([np.cos(heading), np.sin(heading)], 1)
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    rib = np.cumsum(along, 0) * length / len(t)
    stalk = -0.14 * length * along[0]
    corners = np.vstack([rib, stalk])
    shift = fine * (0.5 + rng.uniform(-0.05, 0.05, 2)) - (corners.max(0) + corners.min(0)) / 2
    rib, stalk = rib + shift, stalk + shift
    profile = t**kind.base * (1 - t) ** kind.tip
    half = kind.width * length * rng.uniform(0.95, 1.05) * profile / profile.max()
    saw = ((look["tooth_count"] * t) % 1.0 - 0.5) * np.clip(np.minimum(t, 1 - t) * 10, 0, 1)
    teeth = 2 * max(look["tooth_depth"], 0.0) * length * saw
    sides = {s: half * (1 + s * look["asymmetry"]) for s in (-1, 1)}
    left, right = (rib + s * across * np.maximum(sides[s] + teeth, 0)[:, None] for s in (-1, 1))
    mask, veins = Image.new("L", (fine, fine)), Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(mask)
    pen.polygon([*map(tuple, left), *map(tuple, right[::-1])], fill=255)
    pen.line([tuple(stalk), tuple(rib[3])], fill=255, width=round(2 * thick))
    pen = ImageDraw.Draw(veins)
    slant = np.tan(np.deg2rad(look["vein_angle"]))
    starts = 0.05 + (np.arange(int(look["vein_count"])) + 0.5) / look["vein_count"]
    for s in (-1, 1):
        for start in starts[starts < 0.93]:
            x = np.linspace(0, 1, 40) * sides[s].max()  # away from the midrib
            at = start + x / length / slant + 0.35 * (x / length) ** 2
            n = int((x < 0.96 * np.interp(at, t, sides[s], right=0.0)).argmin())
            path = [np.interp(at[:n], t, rib[:, i]) + s * x[:n] * np.interp(at[:n], t, across[:, i]) for i in (0, 1)]
            path = list(zip(*path, strict=True))
            if n > 2:
                pen.line(path, fill=180, width=round(0.9 * thick))
                pen.line(path[: n // 2 + 1], fill=210, width=round(1.2 * thick))
    pen.line([tuple(stalk), *map(tuple, rib[:200])], fill=230, width=round(1.7 * thick))
    pen.line([*map(tuple, rib[199:236])], fill=190, width=round(thick))
    return _shade_leaf(kind, mask.resize((size, size), BOX), veins.resize((size, size), BOX), rng)


def _shade_leaf(kind: Species, mask: Image.Image, veins: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The blade domes between its veins and falls at its rim: light from one side, gloss, a cast shadow, ground."""
    size, grain = mask.width, np.random.default_rng(rng.integers(2**31))  # what depends on size draws from its own
    inside, line = _array(mask), _array(veins)
    light = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(light), np.sin(light)])
    height = 1.4 * _array(mask, 0.05) - 0.9 * _array(veins, 0.012)
    down, right = np.gradient(height * size / 16)
    relief = right * light[0] + down * light[1]
    mottle = noise(size, grain, 2.2)
    value = kind.value * (1 + 0.07 * mottle + 0.03 * noise(size, grain, 0.6) - 0.18 * _array(veins, 0.02))
    leaf = hsv(kind.hue + 0.012 * mottle + rng.normal(0, 0.008), kind.saturation, value)
    pale = hsv(kind.hue - 0.03, 0.32, min(kind.value + 0.25, 0.95))
    leaf += (pale - leaf) * (0.7 * line)[..., None]
    leaf *= (1 + 0.42 * np.clip(relief, -0.9, 0.9))[..., None]
    leaf += 0.35 * (np.clip(relief - 0.15, 0, None) ** 2)[..., None]
    away = tuple((-light[::-1] * size * 0.025).round().astype(int))
    shadow = _array(Image.fromarray(np.roll(np.asarray(mask), away, (0, 1))), 0.018)
    ground = _ground(size, rng, grain) * (1 - 0.45 * shadow)[..., None]
    picture = ground + (leaf - ground) * inside[..., None]
    y, x = np.mgrid[:size, :size] / size - 0.5
    picture *= (1 + rng.uniform(0, 0.35) * (x * light[0] + y * light[1]))[..., None]
    picture *= (1 + rng.normal(0, 0.04) * np.array([1, 0.1, -1])) * rng.uniform(0.8, 1.15)
    return Image.fromarray(to_uint8(picture + grain.normal(0, 0.012, picture.shape)))


def _ground(size: int, rng: np.random.Generator, grain: np.random.Generator) -> np.ndarray:
    """Paper, soil, leaves out of focus, or cloth."""
    hue, saturation, value, exponent, depth = (
        ((0.08, 0.14), (0.03, 0.15), (0.75, 0.95), 2.5, 0.06),
        ((0.04, 0.10), (0.30, 0.50), (0.25, 0.40), 1.0, 0.2),
        ((0.25, 0.40), (0.20, 0.40), (0.25, 0.50), 2.5, 0.3),
        ((0.50, 0.65), (0.05, 0.30), (0.30, 0.70), 1.5, 0.12),
    )[rng.integers(4)]
    colour = hsv(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))
    return colour * (1 + depth * noise(size, grain, exponent))[..., None]


# shared -------------------------------------------------------------------------------------------------------------


def sample_images(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size) uint8 renders of as many latents."""
    rng = np.random.default_rng(seed)
    painter = Painter(size, rng)
    images = np.concatenate([painter.views(sample_latent(rng), 1) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def noise(size: int, rng: np.random.Generator, exponent: float) -> np.ndarray:
    """(size, size) of mean 0 and deviation 1 whose amplitude falls with frequency as f^-exponent."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    f[0, 0] = np.inf
    return coloured_noise(f**-exponent, rng)


def coloured_noise(amplitude: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise through `amplitude`, over the frequencies of rfft2 of a square; of deviation 1."""
    size = len(amplitude)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), np.float32)) * amplitude
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(size, size))
    return (field / (field.std() + 1e-6)).astype(np.float32)


def hsv(hue, saturation, value) -> np.ndarray:
    """RGB with channels last, of numbers or arrays; the hue goes round at 1."""
    hue, saturation, value = (np.asarray(x, np.float32)[..., None] for x in (hue, saturation, value))
    k = (np.array([5, 3, 1], np.float32) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def to_uint8(picture: np.ndarray) -> np.ndarray:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    image = Image.fromarray(to_uint8(picture)).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(image, np.float32) / 255


def _array(image: Image.Image, blur: float = 0.0) -> np.ndarray:
    """In [0, 1], blurred by a share of the width."""
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur * image.width))
    return np.asarray(image, np.float32) / 255
