"""`local/etcher`: redraws a picture from a URL."""

from tempfile import mkdtemp

from cog import BaseRunner, Input, Path
from PIL import Image, ImageFilter, ImageOps

Image.MAX_IMAGE_PIXELS = 50_000_000


class Predictor(BaseRunner):
    """Redraws pictures."""

    def run(
        self,
        image: Path = Input(  # noqa: B008 - Cog reads inputs from defaults
            description="The picture: an HTTP or data URL.", accept="image/*"
        ),
        style: str = Input(
            description="How to redraw it.",
            default="etching",
            choices=["etching", "duotone", "posterize", "mosaic"],
        ),
    ) -> Path:
        """Redraw a picture."""
        with Image.open(image) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        picture.thumbnail((1536, 1536))
        print(f"Read {picture.width} x {picture.height} pixels; style {style}")
        grey = ImageOps.autocontrast(picture.convert("L"), cutoff=1)
        if style == "etching":
            blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(6))
            lines = Image.composite(Image.new("L", grey.size, 255), grey, blurred.point(lambda level: level))
            drawn = ImageOps.autocontrast(Image.blend(lines, grey.filter(ImageFilter.CONTOUR), 0.45))
            result = ImageOps.colorize(drawn, (40, 30, 28), (250, 244, 230))
        elif style == "duotone":
            result = ImageOps.colorize(grey, (34, 22, 84), (255, 222, 158), mid=(226, 84, 108))
        elif style == "posterize":
            result = ImageOps.posterize(picture.filter(ImageFilter.ModeFilter(7)), 3)
        else:
            small = picture.resize((max(1, picture.width // 16), max(1, picture.height // 16)), Image.Resampling.BOX)
            result = small.resize(picture.size, Image.Resampling.NEAREST)
        file = Path(mkdtemp()) / "out-0.png"
        result.save(file)
        return file
