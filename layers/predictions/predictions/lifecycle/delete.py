"""Delete: the owner's flag, then the data of a prediction that has ended."""

import time
from collections.abc import Callable

from predictions.errors import Problem
from predictions.store.predictions import Prediction, PredictionsTable


class DeletePrediction:
    """Deletes the data of predictions.

    Args:
        table: The predictions.
        now: The time, in seconds since 1970.
    """

    def __init__(self, table: PredictionsTable, *, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now

    @classmethod
    def from_env(cls) -> "DeletePrediction":
        """From what the table reads."""
        return cls(PredictionsTable.from_env())

    def delete_ended(self, prediction: Prediction) -> None:
        """Removes input, output, files and logs of a prediction that has ended, for its owner.

        The flag comes first, so that nobody is shown any of it from then on. Died half-way, or asked again: the next
        call, or the sweep, removes the rest.

        Raises:
            Problem: 409, where it has not ended.
        """
        now = self._now()
        there = self._table.request_delete(prediction.id, now) or self._table.get(prediction.id) or prediction
        if not there.deleted:
            raise Problem(409, _not_ended(there))
        if there.next_check_at is not None:
            self._table.delete_data(there, now)


def _not_ended(prediction: Prediction) -> str:
    if prediction.terminal:
        return f"Prediction {prediction.id} has ended, and its files are being stored: delete it when that is done."
    return f"Prediction {prediction.id} has not ended: cancel it first, and delete it when it has ended."
