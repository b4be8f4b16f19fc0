"""`local/sleeper`: runs for a given time, several at once, and can be canceled meanwhile."""

import asyncio
import time

from cog import BaseRunner, Input, concurrent


class Predictor(BaseRunner):
    """Sleeps."""

    @concurrent(max=16)
    async def run(
        self,
        seconds: float = Input(description="How long to run, in seconds.", default=1.0, ge=0, le=3600),
        text: str = Input(description="Given back as the output.", default="slept well"),
    ) -> str:
        """Sleep and return `text`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            print(f"{left:.1f} s left")
            await asyncio.sleep(min(1.0, left))
        return text
