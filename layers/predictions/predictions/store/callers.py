"""Task tokens of other state machines whose states wait for a prediction to finish."""

from collections.abc import Iterator

from predictions.aws.dynamodb import Condition, Table
from predictions.store.keys import CALLER, caller_key, prediction_key

CALLERS_LIMIT = 1000
"""How many states may wait for one prediction: the consumer of the stream can notify them all in one run."""


class WaitingCallers:
    """The states that wait for predictions."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @classmethod
    def from_env(cls) -> "WaitingCallers":
        """Make them from `TABLE_NAME`."""
        return cls(Table.from_env())

    def add_caller(self, prediction_id: str, task_token: str, expires: int) -> None:
        """Record that a state waits with this token for a prediction, which may not exist yet or have finished.

        publish_changes reads this write from the table's stream, as it reads the end. Twice changes nothing.
        """
        self._table.put_item(caller_key(prediction_id, task_token), {"task_token": task_token, "expires_at": expires})

    def takes_caller(self, prediction_id: str, task_token: str) -> bool:
        """Check whether one more state may wait for a prediction: fewer than `CALLERS_LIMIT` do, or this one does.

        Writers that check at the same time may exceed the limit by their number.
        """
        if sum(self._table.count_items(_callers_of(prediction_id))) < CALLERS_LIMIT:
            return True
        return self._table.get_item(caller_key(prediction_id, task_token)) is not None

    def callers_of(self, prediction_id: str) -> Iterator[tuple[str, str]]:
        """Read the states that wait for a prediction, consistently: the `sk` of each item, and its task token.

        No item is deleted: a token works once, and expires with its prediction.
        """
        for item in self._table.query(_callers_of(prediction_id)):
            yield str(item["sk"]), str(item["task_token"])


def _callers_of(prediction_id: str) -> Condition:
    pk = prediction_key(prediction_id).pk
    return Condition("pk = :pk AND begins_with(sk, :caller)", pk=pk, caller=CALLER)
