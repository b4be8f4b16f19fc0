"""Spending: the budgets that a prediction counts in, asked before it starts."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from predictions.admission.quotas import OwnerLimits
from predictions.admission.rate_limiter import Limiter
from predictions.intents.model import Intent
from predictions.money.cost import Run
from predictions.status import Status
from predictions.store.records import Prediction

if TYPE_CHECKING:
    from predictions.money.budgets import Budgets, Reservation

# A queued request that a budget has no room for asks again after this time at the latest: what runs may cost less than
# was reserved for it.
BUDGET_WAIT_SECONDS = 3600


class Spending:
    """Plan what predictions reserve; nothing is read where neither the owner nor the stack has a budget.

    Args:
        budgets: Makes what knows the use of budgets, with the first budget: a stack without one does not import it.
        limiter: Has the stack's budget.
    """

    def __init__(self, budgets: "Callable[[], Budgets]", limiter: Limiter) -> None:
        self._make = budgets
        self._budgets: Budgets | None = None
        self._limiter = limiter

    @classmethod
    def from_env(cls, limiter: Limiter) -> "Spending":
        """Create from `TABLE_NAME`."""
        return cls(_budgets, limiter)

    def plan_intent(self, intent: Intent, version: str | None, limits: OwnerLimits, now: float) -> "Reservation | None":
        """Return what a request is going to reserve, or None without a budget.

        Args:
            intent: The request.
            version: The version that will run, if it is known.
            limits: The owner's limits and budget.
            now: The time.

        Raises:
            BudgetReached: A budget has no room for it.
        """
        kind, name = intent.reference.kind, intent.reference.name
        return self._plan(intent.owner, limits, intent.object, kind, name, version, intent.reference.version, now)

    def plan(self, prediction: Prediction, limits: Callable[[str], OwnerLimits], now: float) -> "Reservation | None":
        """Return what a waiting prediction is going to reserve; None without a budget, or if it has reserved.

        Args:
            prediction: The prediction. One over HTTP, or of a direct invocation, was planned before it was stored.
            limits: Looks up the limits and budget of an owner.
            now: The time.

        Raises:
            BudgetReached: A budget has no room for it.
        """
        if prediction.source in ("http", "run_job") or prediction.reserved_on:
            return None
        of = limits(prediction.owner)
        version = prediction.version
        return self._plan(
            prediction.owner, of, prediction.object, prediction.kind, prediction.name, version, version, now
        )

    def _plan(
        self,
        owner: str,
        limits: OwnerLimits,
        object_: str,
        kind: str,
        name: str | None,
        version: str | None,
        named_version: str | None,
        now: float,
    ) -> "Reservation | None":
        stacks = self._limiter.stack_budget()
        if limits.budget_day is None and limits.budget_month is None and not any(stacks[:2]):
            return None
        from predictions.money.budgets import budgets_of, run_name

        self._budgets = self._budgets or self._make()
        budgets = budgets_of(owner, (limits.budget_day, limits.budget_month, limits.budget_unknown), stacks)
        deployment = name if kind == "deployment" else None
        model = None if deployment else name
        run = Run(object_, Status.SUCCEEDED, model, version, deployment, started=True, metrics={})
        return self._budgets.plan(run, run_name(object_, kind, name, named_version), owner, budgets, now)


def _budgets() -> "Budgets":
    from predictions.money.budgets import Budgets

    return Budgets.from_env()
