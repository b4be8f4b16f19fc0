"""Spans of time that several steps of the protocol keep to."""

import os
from dataclasses import dataclass

# A bound one is given up by our own word only this long after its deadline, or after that many 404s in a row.
ABANDON_SECONDS = 3600
NOT_FOUND_LIMIT = 5
# That many looks in a row died, or found the execution dead, before a prediction is ended without asking Replicate.
STALLED_LOOKS = 3

# The most that is waited while submissions are paused: then somebody looks whether they still are.
PAUSE_STEP_SECONDS = 300
# A start that is as near as this is not waited for.
SOON_SECONDS = 1
# From the claim to the last byte of the POST: the write, the token, and a connection that takes its time.
CLAIM_SECONDS = 10
# No start is reserved later than this before the deadline: waits are rounded up to whole seconds.
START_MARGIN_SECONDS = 5


@dataclass(frozen=True)
class Lifetimes:
    """How long predictions may take and are kept, in seconds: an operator's choices.

    Attributes:
        prediction: The deadline of a prediction whose caller gives none.
        training: The deadline of a training.
        retention: How long the table keeps a prediction, from its request on.
    """

    prediction: int
    training: int
    retention: int

    @classmethod
    def from_env(cls) -> "Lifetimes":
        """From `DEFAULT_LIFETIME_SECONDS`, `TRAINING_LIFETIME_SECONDS` and `RETENTION_DAYS`."""
        return cls(
            prediction=int(os.environ["DEFAULT_LIFETIME_SECONDS"]),
            training=int(os.environ["TRAINING_LIFETIME_SECONDS"]),
            retention=int(os.environ["RETENTION_DAYS"]) * 86400,
        )
