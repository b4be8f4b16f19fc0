"""Delete: the owner's flag, then the data of a completed prediction."""

import time
from collections.abc import Callable

from predictions.errors import Problem
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction


class DeletePrediction:
    """Delete the data of predictions."""

    def __init__(self, table: PredictionsTable, *, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now

    @classmethod
    def from_env(cls) -> "DeletePrediction":
        """Read what the table reads."""
        return cls(PredictionsTable.from_env())

    def delete_ended(self, prediction: Prediction) -> None:
        """Delete input, output, files and logs of a completed prediction for its owner.

        The flag comes first and hides all of it from then on. After a crash, the next call or the sweep deletes the
        rest.

        Raises:
            Problem: 409, if it is not completed.
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
