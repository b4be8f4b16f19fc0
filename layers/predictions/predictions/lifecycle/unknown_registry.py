"""Registry of creates with an unknown outcome, and of resubmitted predictions.

Readings of Replicate's list are shared: each looks for all that is registered (`pk` = `unknown`). Steps that only
create write here, and need nothing of what reads the list (see `lifecycle.reconcile`).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from predictions.aws.dynamodb import Condition, Table
from predictions.store.keys import unknown_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Collection
from predictions.upstream.errors import OutcomeUnknown

# Seconds after the end of a claim's holder: a 5xx is mostly a create that was not accepted, and lists are fast.
_LOOKS_ANSWERED = (3, 10, 30)
_LOOKS_UNANSWERED = (10, 30, 90)

_HISTORY = 8


class UnknownRegistry:
    """Register what readings of Replicate's list look for.

    Args:
        grace: Seconds after the end of a claim's holder before which the second reading may not begin.
    """

    def __init__(
        self,
        table: PredictionsTable,
        items: Table,
        *,
        grace: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._items = items
        self._grace = grace
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable) -> "UnknownRegistry":
        """Read `TABLE_NAME` and `SUBMIT_GRACE_SECONDS`."""
        return cls(table, Table.from_env(), grace=int(os.environ["SUBMIT_GRACE_SECONDS"]))

    # -- claims -----------------------------------------------------------------------------------------------

    def note(self, prediction: Prediction, error: OutcomeUnknown) -> int:
        """Record that the holder of a claim is done, with an unknown outcome of its create.

        If the function crashes before this, `submit_until` in the item says when it was done at the latest.

        Returns:
            The seconds to the first look.
        """
        # First: a function that finds `submit_over` relies on readings by others for it.
        self.register(prediction)
        now = self._now()
        outcome = f"answered {error.status}" if error.status else "no answer"
        wait = self.looks(replace(prediction, submit_answered=error.status is not None))[0]
        values = {
            "submit_over": math.ceil(now),
            "submit_answered": error.status is not None,
            "submissions_json": append_to(prediction.submissions_json, {"at": prediction.claimed, "outcome": outcome}),
            "next_check_at": int(now) + wait + 120,
        }
        self._table.note_unknown(prediction, values)  # unless a webhook has bound it meanwhile
        return wait

    def register(self, prediction: Prediction) -> None:
        """Register a claim, so that every reading of the list looks for it."""
        self._put(f"claim#{prediction.claimed:010d}#{prediction.id}", prediction)

    def looks(self, prediction: Prediction) -> tuple[int, ...]:
        """Return when to look for a claim, in seconds after its holder was done."""
        looks = _LOOKS_ANSWERED if prediction.submit_answered else _LOOKS_UNANSWERED
        return tuple(sorted({*looks, self._grace + 1}))

    def claims(self, collection: Collection) -> dict[str, Prediction]:
        """Return the registered claims that are still unknown; remove the others."""
        keys: dict[str, list[str]] = {}
        for item in self._query("claim#"):
            if item["collection"] == collection:
                keys.setdefault(str(item["id"]), []).append(str(item["sk"]))
        there = self._table.get_many(keys)
        claims = {}
        for id_, sks in keys.items():
            prediction = there.get(id_)
            open_ = prediction is not None and not prediction.terminal and not prediction.upstream_id
            for sk in sks:
                if prediction is not None and open_ and sk == f"claim#{prediction.claimed or 0:010d}#{id_}":
                    claims[id_] = prediction
                else:
                    self.remove(sk)
        return claims

    # -- predictions that were submitted again ----------------------------------------------------------------

    def watch(self, prediction: Prediction) -> None:
        """Register a prediction that is about to be submitted again, so that the list is read again afterwards."""
        self._put(f"again#{prediction.id}", prediction)

    def watched(self) -> list[dict[str, Any]]:
        """Return the items of the predictions that were submitted again."""
        return self._query("again#")

    def note_watched(self, item: Mapping[str, Any], read_at: int) -> None:
        """Record when the list was last read for a prediction that was submitted again."""
        self._items.put_item(unknown_key(item["sk"]), {**item, "read_at": read_at})

    def remove(self, sk: str) -> None:
        """Remove what is registered under a sort key."""
        self._items.delete_item(unknown_key(sk))

    # -- inside -----------------------------------------------------------------------------------------------

    def _put(self, sk: str, prediction: Prediction) -> None:
        expires = max(prediction.deadline, int(self._now())) + 86400
        item = {"id": prediction.id, "collection": prediction.collection, "expires_at": expires}
        self._items.put_item(unknown_key(sk), item)

    def _query(self, begin: str) -> list[dict[str, Any]]:
        entries = Condition("pk = :pk AND begins_with(sk, :begin)", pk=unknown_key("").pk, begin=begin)
        return list(self._items.query(entries, consistent=False))


def append_to(
    history_json: str | None, entry: Mapping[str, Any], keep: Callable[[Mapping[str, Any]], bool] = lambda _: False
) -> str:
    """Return a history in JSON with one more entry, without its oldest beyond the limit; the last to keep stays."""
    history = [*json.loads(history_json or "[]"), entry]
    older, newest = history[:-_HISTORY], history[-_HISTORY:]
    if older and not any(map(keep, newest)):
        newest = [*[each for each in older if keep(each)][-1:], *newest[1:]]
    return json.dumps(newest, separators=(",", ":"))
