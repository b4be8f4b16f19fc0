"""Settlement: what a prediction has reserved in budgets is replaced by its true cost, once it has visibly ended.

The consumer of the table's stream does it. What the item says decides, not what the record says that changed: so a
record that comes twice or late changes nothing, and a cost that is known later (`prices apply`) corrects the budgets
in the same way. One transaction marks the item and corrects the budgets: a crash leaves both or neither.
"""

from predictions.aws.dynamodb import Condition, Table, TransactionRefused, UpdateWrite
from predictions.money.budgets import Budgets, owners_in, run_name
from predictions.store.keys import prediction_key
from predictions.store.records import Prediction, prediction_of


class Settlements:
    """Settles predictions in budgets.

    Args:
        table: The table.
        budgets: What is used of the budgets.
    """

    def __init__(self, table: Table, budgets: Budgets) -> None:
        self._table = table
        self._budgets = budgets

    @classmethod
    def from_env(cls) -> "Settlements":
        """Create from `TABLE_NAME`."""
        return cls(Table.from_env(), Budgets.from_env())

    def settle(self, prediction: Prediction, now: float) -> None:
        """Put the cost of a prediction that has visibly ended in the place of what it reserved.

        An unknown cost counts as the budget's unknown price. If the item says that this was done, only the thresholds
        are looked at: so they are after each settlement, since its mark is a change of the item too.

        Args:
            prediction: The prediction as a record of the stream has it: if it has changed since, it is read again.
            now: The time.
        """
        known: Prediction | None = prediction
        while known is not None and known.reserved_on and (cost := known.cost):
            amount = known.reserved_unknown if cost.micro_dollars is None else cost.micro_dollars
            is_unknown = cost.micro_dollars is None
            owners = owners_in(known.owner, known.reserved_in or "")
            if known.settled_micro_dollars == amount and known.settled_unknown == is_unknown:
                for owner in owners:
                    self._budgets.report(owner, known.reserved_on, now)
                return
            before = known.settled_micro_dollars
            counted = (known.reserved_micro_dollars or 0) if before is None else before
            unknown = (amount if is_unknown else 0) - (counted if known.settled_unknown else 0)
            run = None
            if cost.micro_dollars is not None and cost.price:
                run = (known.owner, run_name(known.object, known.kind, known.name, known.version), cost.micro_dollars)
            try:
                self._budgets.settle(
                    _mark(known, amount, is_unknown=is_unknown),
                    owners,
                    known.reserved_on,
                    {"used": amount - counted, "unknown": unknown},
                    run,
                    now,
                )
            except TransactionRefused:
                item = self._table.get_item(prediction_key(known.id))
                known = prediction_of(item) if item else None
            else:
                return


def _mark(prediction: Prediction, amount: int, *, is_unknown: bool) -> UpdateWrite:
    """Return the write that says what was settled, unless another settlement came in between."""
    as_read = {"created": prediction.created, "reserved_on": prediction.reserved_on}
    text = "created = :created AND reserved_on = :reserved_on"
    if prediction.settled_micro_dollars is None:
        text += " AND attribute_not_exists(settled_micro_dollars)"
    else:
        text += " AND settled_micro_dollars = :settled AND settled_unknown = :was_unknown"
        as_read |= {"settled": prediction.settled_micro_dollars, "was_unknown": prediction.settled_unknown}
    return UpdateWrite(
        prediction_key(prediction.id),
        set={"settled_micro_dollars": amount, "settled_unknown": is_unknown},
        condition=Condition(text, **as_read),
    )
