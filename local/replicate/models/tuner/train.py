"""Training of `local/tuner`: counts the pairs of words in a text."""

import itertools
import json
import time
from collections import Counter, defaultdict
from tempfile import mkdtemp

from cog import BaseModel, Input, Path


class TrainingOutput(BaseModel):
    """The output of a training."""

    weights: Path


def train(
    train_data: Path = Input(description="A text file: the manner to learn."),  # noqa: B008 - the way of Cog
    epochs: int = Input(description="How often the text is read.", default=3, ge=1, le=1000),
    seconds: float = Input(description="How long to take at least, in seconds.", default=0.0, ge=0, le=3600),
) -> TrainingOutput:
    """Count the pairs of words."""
    words = train_data.read_text(errors="replace").split()
    if len(words) < 2:
        raise ValueError("The training data holds fewer than two words")
    following: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for epoch in range(epochs):
        for word, after in itertools.pairwise(words):
            following[word][after] += 1
        end = time.monotonic() + seconds / epochs
        while time.monotonic() < end:  # in small steps, between which it can be canceled
            time.sleep(0.05)
        print(f"Epoch {epoch + 1} of {epochs}: {len(words)} words, {len(following)} of them different")
    file = Path(mkdtemp()) / "weights.json"
    file.write_text(json.dumps({word: dict(counted) for word, counted in following.items()}))
    return TrainingOutput(weights=file)
