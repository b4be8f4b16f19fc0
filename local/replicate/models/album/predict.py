"""`local/album`: an object with files at several depths, next to plain values and URLs that are not files."""

from tempfile import mkdtemp
from typing import Any

from cog import BaseModel, BaseRunner, Input, Path
from PIL import Image, ImageDraw


class Output(BaseModel):
    """An album; `homepage` is a URL that is not a file of this model."""

    title: str
    homepage: str
    cover: Path
    pages: list[Path]
    details: dict[str, Any]


class Predictor(BaseRunner):
    """Makes albums."""

    def run(
        self,
        title: str = Input(description="Written on each picture.", default="Album"),
        pages: int = Input(description="Number of pages.", default=2, ge=0, le=20),
    ) -> Output:
        """Make an album."""
        folder = Path(mkdtemp())

        def picture(name: str, text: str) -> Path:
            image = Image.new("RGB", (240, 160), (238, 228, 208))
            ImageDraw.Draw(image).text((16, 16), text, fill=(60, 48, 40))
            image.save(folder / name)
            return folder / name

        return Output(
            title=title,
            homepage="https://example.com/album.png",
            cover=picture("cover.png", title),
            pages=[
                picture("page.png", f"{title}: page {number + 1}").rename(folder / f"page-{number}.png")
                for number in range(pages)
            ],
            details={"colours": ["sand", "umber"], "thumbnails": {"small": picture("small.jpg", title)}},
        )
