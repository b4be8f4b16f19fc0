"""Time limits that several steps of the protocol share."""

import os
from dataclasses import dataclass

# The stack itself ends a bound prediction only this long after its deadline, or after that many 404s in a row.
ABANDON_SECONDS = 3600
NOT_FOUND_LIMIT = 5
# Checks in a row that crashed or found the execution dead, before a prediction is ended without asking Replicate.
STALLED_LOOKS = 3

# Longest wait, in seconds, until a waiting prediction checks whether submissions are still paused.
PAUSE_STEP_SECONDS = 300
# No wait for a start that is this near.
SOON_SECONDS = 1
# From the claim to the last byte of the POST: the write, the token, and a connection that takes its time.
CLAIM_SECONDS = 10
# The latest start is this long before the deadline: waits are rounded up to whole seconds.
START_MARGIN_SECONDS = 5


@dataclass(frozen=True)
class Lifetimes:
    """Hold how long predictions may take and are stored, in seconds, as the operator configured it.

    Attributes:
        prediction: The deadline of a prediction whose caller gives none.
        training: The deadline of a training.
        retention: How long the table stores a prediction, from its request on.
    """

    prediction: int
    training: int
    retention: int

    @classmethod
    def from_env(cls) -> "Lifetimes":
        """Read `DEFAULT_LIFETIME_SECONDS`, `TRAINING_LIFETIME_SECONDS` and `RETENTION_DAYS`."""
        return cls(
            prediction=int(os.environ["DEFAULT_LIFETIME_SECONDS"]),
            training=int(os.environ["TRAINING_LIFETIME_SECONDS"]),
            retention=int(os.environ["RETENTION_DAYS"]) * 86400,
        )
