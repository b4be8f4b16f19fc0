"""`local/storyteller`: tells a small story about the prompt, word by word."""

import hashlib
import random
import time
from collections.abc import Iterator

from cog import BaseRunner, ConcatenateIterator, Input, streaming

openings = (
    "Once, in a town without clocks, there was",
    "Nobody in the harbour had ever seen",
    "It began with",
)
turns = (
    "Every evening it grew a little lighter,",
    "The old cartographer drew it at last,",
    "By morning the river knew,",
)
doubts = (
    "and yet nobody could say why.",
    "as if somebody had asked it to.",
    "which surprised the children most of all.",
)
endings = (
    "That is how the lamps came to be lit.",
    "And the sea, for once, kept quiet.",
    "The rest is on the map.",
)


def words(prompt: str, count: int) -> Iterator[str]:
    """Yield exactly `count` words of a story that depends on nothing but the prompt."""
    random_ = random.Random(hashlib.sha256(prompt.encode()).digest())  # noqa: S311 - a story, not a secret
    story = f"{random_.choice(openings)} {prompt.strip()}."
    while len(story.split()) < count:
        story += f" {random_.choice(turns)} {random_.choice(doubts)} {random_.choice(endings)}"
    yield from story.split()[:count]


def pause(seconds: float) -> None:
    """Sleep in short steps: Cog cannot interrupt a sleep to cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


class Predictor(BaseRunner):
    """Tells stories."""

    @streaming
    def run(
        self,
        prompt: str = Input(description="What the story is about."),
        max_tokens: int = Input(description="Number of words.", default=24, ge=1, le=2000),
        delay_seconds: float = Input(description="Pause before each word, in seconds.", default=0.01, ge=0, le=10),
    ) -> ConcatenateIterator[str]:
        """Tell a story, a word at a time."""
        print(f"Telling {max_tokens} words")
        for number, word in enumerate(words(prompt, max_tokens)):
            pause(delay_seconds)
            yield word if number == 0 else f" {word}"
