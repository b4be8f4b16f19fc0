"""`local/series`: several pictures of one colour, one after the other (a list of files that grows)."""

import colorsys
import time
from collections.abc import Iterator
from tempfile import mkdtemp

from cog import BaseRunner, Input, Path
from PIL import Image


def pause(seconds: float) -> None:
    """Sleep in short steps: Cog cannot interrupt a sleep to cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


class Predictor(BaseRunner):
    """Paints series of pictures."""

    def run(
        self,
        count: int = Input(description="Number of pictures.", default=3, ge=0, le=20),
        hue: float = Input(description="Colour to start from, 0 to 1.", default=0.6, ge=0, le=1),
        delay_seconds: float = Input(description="Pause before each picture, in seconds.", default=0.0, ge=0, le=60),
    ) -> Iterator[Path]:
        """Yield one picture after the other."""
        folder = Path(mkdtemp())
        for number in range(count):
            pause(delay_seconds)
            print(f"Picture {number + 1} of {count}")
            red, green, blue = colorsys.hsv_to_rgb((hue + number / 20) % 1, 0.55, 0.9)
            picture = Image.new("RGB", (96, 96), (round(red * 255), round(green * 255), round(blue * 255)))
            file = folder / f"out-{number}.png"
            picture.save(file)
            yield file
