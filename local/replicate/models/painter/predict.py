"""`local/painter`: paints a landscape from a prompt, with Pillow only.

The words of the prompt choose palette and scene (dawn, night, desert, sea, …), chance does the rest: the same
prompt and seed give the same picture, byte for byte.
"""

import hashlib
import itertools
import math
import random
from tempfile import mkdtemp

from cog import BaseRunner, Input, Path
from PIL import Image, ImageChops, ImageDraw, ImageFilter

type_of_format = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
sizes = {"1:1": (768, 768), "16:9": (1024, 576), "3:2": (960, 640), "4:5": (640, 800), "9:16": (576, 1024)}

Colour = tuple[int, int, int]

# sky from top to horizon, light of the sun or moon, nearest ridge
palettes: dict[str, tuple[list[Colour], Colour, Colour]] = {
    "dawn": (
        [(58, 54, 110), (150, 98, 142), (242, 158, 134), (255, 216, 168)],
        (255, 241, 205),
        (38, 32, 66),
    ),
    "dusk": ([(28, 26, 78), (112, 54, 116), (226, 98, 92), (255, 184, 108)], (255, 226, 160), (26, 18, 48)),
    "night": ([(6, 10, 34), (14, 26, 66), (34, 56, 108), (84, 112, 158)], (236, 240, 255), (5, 9, 24)),
    "day": (
        [(46, 112, 190), (98, 164, 222), (168, 210, 238), (232, 244, 248)],
        (255, 253, 236),
        (24, 66, 72),
    ),
    "forest": (
        [(70, 118, 128), (136, 178, 168), (202, 220, 190), (246, 240, 208)],
        (255, 250, 220),
        (14, 44, 38),
    ),
    "desert": (
        [(74, 124, 168), (168, 176, 172), (240, 196, 140), (255, 224, 176)],
        (255, 244, 210),
        (112, 46, 30),
    ),
    "winter": (
        [(92, 122, 164), (150, 178, 206), (206, 222, 236), (246, 246, 248)],
        (255, 250, 240),
        (44, 66, 96),
    ),
}
words = {
    "dawn": ("dawn", "sunrise", "morning", "pink", "spring"),
    "dusk": ("dusk", "sunset", "evening", "red", "orange", "autumn"),
    "night": ("night", "moon", "star", "midnight", "dark"),
    "day": ("day", "noon", "blue", "summer", "sunny"),
    "forest": ("forest", "green", "jungle", "wood", "valley"),
    "desert": ("desert", "dune", "sand", "canyon", "mars"),
    "winter": ("winter", "snow", "ice", "frost", "arctic"),
}
water_words = ("sea", "lake", "ocean", "water", "river", "reflection", "coast", "fjord")


def blend(one: Colour, other: Colour, share: float) -> Colour:
    """Return the colour that is `share` (0 to 1) of the way from `one` to `other`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))  # type: ignore[return-value]


def gradient(size: tuple[int, int], colours: list[Colour]) -> Image.Image:
    """Return a vertical gradient through `colours`."""
    column = Image.new("RGB", (1, len(colours)))
    column.putdata(colours)
    return column.resize(size, Image.Resampling.BICUBIC)


def static(random_: random.Random, size: tuple[int, int], swing: int) -> Image.Image:
    """Return seeded grey noise of 128 ± `swing` (`Image.effect_noise` has no seed)."""
    noise = Image.frombytes("L", size, random_.randbytes(size[0] * size[1]))
    return noise.point([128 + round((level - 127.5) / 127.5 * swing) for level in range(256)])


def ridge(random_: random.Random, width: int, roughness: float, points: int = 9) -> list[float]:
    """Return heights of about -1 to 1 for each column, by midpoint displacement."""
    heights = [random_.uniform(-0.7, 0.7) for _ in range(points)]
    step = 0.55
    while len(heights) < width:
        between = [(a + b) / 2 + random_.uniform(-step, step) for a, b in itertools.pairwise(heights)]
        heights = [height for pair in zip(heights, [*between, 0.0], strict=True) for height in pair][:-1]
        step *= roughness
    return [heights[round(x * (len(heights) - 1) / (width - 1))] for x in range(width)]


def paint(prompt: str, seed: int, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Return the picture and the name of its palette."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    random_ = random.Random(digest)  # noqa: S311 - a picture, not a secret
    text = prompt.lower()
    scored = {name: sum(word in text for word in words[name]) for name in palettes}
    best = max(scored.values())
    name = random_.choice([name for name, score in scored.items() if score == best])
    sky_colours, light, near = palettes[name]

    width, height = size
    has_water = any(word in text for word in water_words) or random_.random() < 0.4
    horizon = int(height * (0.66 if has_water else 0.74))
    sky = gradient((width, horizon), sky_colours)
    picture = Image.new("RGB", size, sky_colours[-1])
    picture.paste(sky, (0, 0))

    if name in ("night", "dusk"):
        draw = ImageDraw.Draw(picture, "RGBA")
        for _ in range(width * horizon // (1500 if name == "night" else 6000)):
            x, y = random_.randrange(width), int(horizon * random_.random() ** 1.6)
            fade = 1 - y / horizon
            draw.point((x, y), (255, 255, 255, int(random_.uniform(60, 255) * fade)))
            if random_.random() < 0.04:
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), (255, 255, 245, int(200 * fade)))

    # Clouds: noise stretched sideways, thinned towards the top, added as light.
    noise = static(random_, (width // 24, horizon // 9), 110).filter(ImageFilter.GaussianBlur(1.2))
    clouds = noise.resize((width, horizon), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(width / 160))
    clouds = clouds.point([max(0, min(255, (level - 132) * 5)) for level in range(256)])
    fading = gradient((width, horizon), [(30, 30, 30), (150, 150, 150), (90, 90, 90)]).convert("L")
    mask = ImageChops.multiply(clouds, fading)
    if name != "night":
        picture.paste(Image.new("RGB", (width, horizon), blend(sky_colours[-1], light, 0.5)), (0, 0), mask)

    # The sun or moon and its glow, drawn once small and blurred.
    radius = height * (0.045 if name == "night" else 0.06)
    sun_x = width * random_.choice((0.30, 0.36, 0.62, 0.7))
    sun_y = horizon * random_.uniform(0.34, 0.72)
    for spread, strength in ((7.5, 0.34), (3.4, 0.4), (1.7, 0.5)):
        glow = Image.new("L", (width, height), 0)
        reach = radius * spread * 0.6
        ImageDraw.Draw(glow).ellipse((sun_x - reach, sun_y - reach, sun_x + reach, sun_y + reach), int(255 * strength))
        glow = glow.resize((width // 8, height // 8)).filter(ImageFilter.GaussianBlur(reach / 16))
        picture.paste(Image.new("RGB", size, light), (0, 0), glow.resize(size, Image.Resampling.BICUBIC))
    disc = Image.new("L", (width * 2, height * 2), 0)
    ImageDraw.Draw(disc).ellipse([2 * v for v in (sun_x - radius, sun_y - radius, sun_x + radius, sun_y + radius)], 255)
    picture.paste(Image.new("RGB", size, blend(light, (255, 255, 255), 0.6)), (0, 0), disc.resize(size))

    # Ridges from far to near: each darker, rougher and lower, with mist at its foot.
    layers = 5
    for layer in range(layers):
        share = layer / (layers - 1)
        heights = ridge(random_, width, 0.5 if name == "desert" else 0.56)
        swing = height * (0.075 + 0.055 * share)
        middle = horizon - height * (0.20 - 0.20 * share) if not has_water else horizon - height * (0.19 - 0.13 * share)
        outline = [(x, middle - swing * value) for x, value in enumerate(heights)]
        floor = horizon if has_water else height
        colour = blend(blend(sky_colours[-1], near, 0.28), near, share**0.85)
        shape = Image.new("L", (width, height), 0)
        ImageDraw.Draw(shape).polygon([*outline, (width, floor), (0, floor)], 255)
        slope = gradient(size, [colour] * 5 + [blend(colour, sky_colours[-1], 0.55 * (1 - share))] * 2)
        if name == "winter" and layer < layers - 1:
            slope = gradient(size, [blend(colour, (255, 255, 255), 0.75 - 0.4 * share), colour, colour])
        picture.paste(slope, (0, 0), shape)
        if layer == layers - 1 and name in ("forest", "winter", "dawn", "day"):
            trees = ImageDraw.Draw(picture)
            for x in range(0, width, 7):
                if random_.random() < 0.62:
                    foot = outline[x][1] + 6
                    tall = height * random_.uniform(0.018, 0.058)
                    for part in range(3):
                        wide = tall * (0.16 + 0.07 * part)
                        top = foot - tall + part * tall * 0.26
                        trees.polygon([(x, top), (x - wide, top + tall * 0.46), (x + wide, top + tall * 0.46)], colour)

    if has_water:
        depth = height - horizon
        mirrored = picture.crop((0, horizon - depth, width, horizon)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        mirrored = mirrored.filter(ImageFilter.GaussianBlur(1.6))
        water = Image.new("RGB", (width, depth))
        for y in range(depth):  # each row shifted a little more the nearer it is
            shift = round(math.sin(y * 0.55 + random_.uniform(-0.6, 0.6)) * (1 + 7 * y / depth))
            row = mirrored.crop((0, y, width, y + 1))
            water.paste(ImageChops.offset(row, shift, 0), (0, y))
        tint = gradient((width, depth), [sky_colours[1], near])
        picture.paste(Image.blend(water, tint, 0.34), (0, horizon))
        shine = ImageDraw.Draw(picture, "RGBA")
        for _ in range(150):
            y = horizon + 2 + int((depth - 3) * random_.random() ** 1.5)
            near_share = (y - horizon) / depth
            x = sun_x + random_.gauss(0, radius * (0.5 + 2.0 * near_share))
            long = random_.uniform(3, 10 + 28 * near_share)
            shine.line((x - long, y, x + long, y), (*light, int(random_.uniform(40, 150))), 1 + int(near_share * 2))

    # Grain and a darker edge, so that flat areas do not look printed.
    grain = static(random_, size, 9).convert("RGB")
    picture = ImageChops.add(picture, grain, 1, -128)
    edge = Image.radial_gradient("L").resize(size).point([max(0, level - 150) for level in range(256)])
    picture.paste(Image.new("RGB", size, blend(near, (0, 0, 0), 0.5)), (0, 0), edge)
    return picture, name


class Predictor(BaseRunner):
    """Paints landscapes."""

    def run(
        self,
        prompt: str = Input(description="What to paint. Words such as dawn, night, desert or sea choose the scene."),
        seed: int = Input(description="Same prompt and seed: same picture.", default=0, ge=0),
        aspect_ratio: str = Input(
            description="Shape of the picture.", default="3:2", choices=["1:1", "16:9", "3:2", "4:5", "9:16"]
        ),
        output_format: str = Input(description="File format.", default="png", choices=["png", "jpg", "webp"]),
    ) -> Path:
        """Paint a landscape."""
        size = sizes[aspect_ratio]
        print(f"Painting {size[0]} x {size[1]} pixels with seed {seed}")
        picture, palette = paint(prompt, seed, size)
        print(f"Palette: {palette}")
        file = Path(mkdtemp()) / f"out-0.{output_format}"
        picture.save(file, type_of_format[output_format], quality=92)
        return file
