"""Draw the output of ``make demo`` as an SVG: ``make picture`` writes docs/demo.svg, which the README shows.

The lines are those of the terminal, with its colours; the two pictures are output files of the run, scaled down. An SVG
in a page may load nothing from elsewhere, so the pictures are embedded as data URLs.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import TextIO

from local.demo import DROPPED, PICTURE

LINE_HEIGHT = 16
LEFT, TOP = 18, 50
TEXT_WIDTH = 716
"""Pixels for 102 characters of a monospace font of 11.5 pixels, whose characters are 6.9 to 7 pixels wide."""
LINE_CHARACTERS = 102
IMAGE_WIDTH = 270
WIDTH = LEFT + TEXT_WIDTH + IMAGE_WIDTH + LEFT

# Classes of the codes that local/terminal.py uses (ECMA-48 "select graphic rendition").
CLASSES = {"1": "bold", "2": "dim", "31": "red", "32": "green", "36": "name"}
PAINTED = re.compile(r"\033\[(\d+)m(.*?)\033\[0m")

STYLE = """
    .window { fill: #0d1117; stroke: #30363d; }
    .bar { fill: #161b22; }
    text { fill: #c9d1d9; white-space: pre;
           font: 11.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
    .title { fill: #8b949e; text-anchor: middle; }
    .caption { fill: #8b949e; }
    .bold { font-weight: 700; fill: #f0f6fc; }
    .dim { fill: #8b949e; }
    .name { fill: #56d4dd; }
    .green { fill: #56d364; }
    .red { fill: #ff7b72; }
"""


class Recorder(io.StringIO):
    """A stream that records text with its colours, and copies it to another stream without them."""

    def __init__(self, shown: TextIO) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        """Record a text and copy it."""
        self._shown.write(PAINTED.sub(r"\2", text))
        self._shown.flush()
        return super().write(text)

    @property
    def parts(self) -> list[list[str]]:
        """Return the recorded lines, as blocks separated by blank lines."""
        blocks = re.split(r"\n\n+", self.getvalue().strip("\n"))
        return [block.split("\n") for block in blocks]


def draw_demo(parts: Sequence[Sequence[str]], files: Sequence[bytes]) -> str:
    """Return an SVG of the two parts of the demonstration that make a picture.

    The first one is drawn with its figures, if they were shown. The link below the last line leads to a file of this
    machine, so it is left out.

    Args:
        parts: The terminal's output, as `Recorder.parts`.
        files: The output files of the demonstration, in its order.
    """
    titles = [PAINTED.sub(r"\2", part[0]) for part in parts]
    first, dropped = titles.index(PICTURE.title), titles.index(DROPPED.title)
    figures = ["", *parts[first + 1]] if parts[first + 1][0].startswith(" ") else []
    acts = [
        ([*parts[first], *figures], files[0], "the output file, stored in your bucket"),
        (parts[dropped], files[1], "the same file, redrawn by the recipe"),
    ]
    (last,) = (line for line in parts[-1] if PAINTED.sub(r"\2", line).startswith("✓"))
    return draw(acts, last, "make demo")


def draw(acts: Sequence[tuple[Sequence[str], bytes, str]], last: str, command: str) -> str:
    """Return an SVG of parts of the demonstration, each next to its picture.

    Args:
        acts: For each, its lines as the terminal coloured them, its file, and a caption.
        last: The line below all of them.
        command: The typed command, as the title of the window.
    """
    drawn: list[str] = []
    y = TOP
    for lines, image, caption in acts:
        data, height = smaller(image)
        x = LEFT + TEXT_WIDTH
        drawn.append(
            f'  <image x="{x}" y="{y - 12}" width="{IMAGE_WIDTH}" height="{height}"'
            f' href="data:image/jpeg;base64,{data}"/>'
        )
        drawn.append(f'  <text class="caption" x="{x}" y="{y + height + 4}">{escape(caption)}</text>')
        drawn += [text(line, y + number * LINE_HEIGHT) for number, line in enumerate(lines)]
        y += max(len(lines) * LINE_HEIGHT, height + 2 * LINE_HEIGHT) + LINE_HEIGHT
    drawn.append(text(last, y))
    height = y + LINE_HEIGHT
    title = f"What {command} shows"
    description = "The terminal's lines, and the pictures from the two predictions."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        ' aria-labelledby="title what">\n'
        f'  <title id="title">{escape(title)}</title>\n  <desc id="what">{description}</desc>\n'
        f"  <style>{STYLE}  </style>\n"
        f'  <rect class="window" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>\n'
        f'  <path class="bar" d="M1 9 a8 8 0 0 1 8 -8 H{WIDTH - 9} a8 8 0 0 1 8 8 V28 H1 z"/>\n'
        f'  <text class="title" x="{WIDTH / 2:g}" y="19">{escape(command)}</text>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def text(line: str, y: float) -> str:
    """Return one line of the terminal as an element, its coloured parts as spans."""
    if len(line) > LINE_CHARACTERS and not PAINTED.search(line):
        line = line[: LINE_CHARACTERS - 1] + "…"
    spans, end = [], 0
    for painted in PAINTED.finditer(line):
        spans.append(escape(line[end : painted.start()], quote=False))
        spans.append(f'<tspan class="{CLASSES[painted[1]]}">{escape(painted[2], quote=False)}</tspan>')
        end = painted.end()
    spans.append(escape(line[end:], quote=False))
    return f'  <text x="{LEFT}" y="{y:g}" xml:space="preserve">{"".join(spans)}</text>'


def smaller(image: bytes) -> tuple[str, int]:
    """Return a picture as a base64 JPEG of the drawing's width, and its height."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        height = round(opened.height * IMAGE_WIDTH / opened.width)
        # Twice the size: most screens have two pixels for each of the drawing's.
        resized = opened.convert("RGB").resize((2 * IMAGE_WIDTH, 2 * height), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    resized.save(written, "JPEG", quality=82, optimize=True)
    return base64.b64encode(written.getvalue()).decode(), height
