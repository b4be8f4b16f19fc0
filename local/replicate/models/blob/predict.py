"""`local/blob`: a file of any size, name and type, or the same as a `data:` URL."""

import base64
import mimetypes
import random
from tempfile import mkdtemp
from typing import Any

from cog import BaseRunner, Input, Path

MIB = 1024 * 1024


class Predictor(BaseRunner):
    """Writes files."""

    def run(
        self,
        size_bytes: int = Input(description="Size of the file, in bytes.", default=1024, ge=0, le=5 * 1024 * MIB),
        name: str = Input(description="Name of the file.", default="blob.bin", max_length=100),
        seed: int = Input(description="Same seed and size: same bytes.", default=0),
        as_data_url: bool = Input(description="Answer with a data: URL, not with a file.", default=False),
    ) -> Any:
        """Write a file."""
        file = Path(mkdtemp()) / Path(name).name
        random_ = random.Random(seed)  # noqa: S311 - bytes to copy, not a secret
        left = size_bytes
        with file.open("wb") as opened:
            while left:
                part = random_.randbytes(min(MIB, left))
                opened.write(part)
                left -= len(part)
        print(f"Wrote {size_bytes} bytes to {file.name}")
        if not as_data_url:
            return file
        content_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return f"data:{content_type};base64,{base64.b64encode(file.read_bytes()).decode()}"
