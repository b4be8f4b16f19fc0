"""`local/narrator`: a language model at a pace: words over some seconds, with its progress in the logs."""

import time
from collections.abc import Iterator

from cog import BaseRunner, ConcatenateIterator, Input, streaming

WORDS = ["the", "tide", "comes", "in", "and", "the", "tide", "goes", "out", "and", "the", "lamp", "is", "lit"]


def pause(seconds: float) -> None:
    """Sleep in short steps: Cog cannot interrupt a sleep to cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


def bar(done: int, total: int) -> str:
    """Return a line as tqdm prints it, from which clients read the progress."""
    return f"{100 * done // total:3}%|{'#' * (10 * done // total):<10}| {done}/{total} [00:00<00:00, 1.00it/s]"


def words(prompt: str, count: int) -> Iterator[str]:
    """Yield `count` words: those of the prompt, then the same ones over and over."""
    spoken = prompt.split()
    for number in range(count):
        yield spoken[number] if number < len(spoken) else WORDS[(number - len(spoken)) % len(WORDS)]


class Predictor(BaseRunner):
    """Narrates."""

    @streaming
    def run(
        self,
        prompt: str = Input(description="The first words."),
        words_total: int = Input(description="Number of words.", default=12, ge=1, le=500),
        seconds: float = Input(description="Time for all words together, in seconds.", default=6.0, ge=0, le=600),
    ) -> ConcatenateIterator[str]:
        """Narrate, a word at a time."""
        for number, word in enumerate(words(prompt, words_total), 1):
            pause(seconds / words_total)
            print(bar(number, words_total))
            yield word if number == 1 else f" {word}"
