"""`local/crasher`: fails, in a chosen way."""

import os
import time

from cog import BaseRunner, Input


def pause(seconds: float) -> None:
    """Sleep in short steps: Cog cannot interrupt a sleep to cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


class Predictor(BaseRunner):
    """Fails."""

    def run(
        self,
        message: str = Input(description="The error.", default="The model ran out of paint"),
        after_seconds: float = Input(description="Time before it fails, in seconds.", default=0.0, ge=0, le=600),
        how: str = Input(
            description="exception: the model raises it; exit: its process ends.",
            default="exception",
            choices=["exception", "exit"],
        ),
    ) -> str:
        """Never returns."""
        print("Mixing the colours")
        pause(after_seconds)
        print(f"About to fail ({how})")
        if how == "exit":
            os._exit(3)
        raise RuntimeError(message)
