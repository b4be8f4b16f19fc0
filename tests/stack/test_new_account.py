"""The deployed stack in an account that runs ten functions at once, as new ones do, while everything is wrong."""

import pytest

from tests.reliability import Recorded
from tests.stack.audit import verdict
from tests.stack.crowd import Crowd, throttled
from tests.stack.faults import everything_at_once, faulty_stack

# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html: new accounts start with less than 1,000
CONCURRENCY = 10
PREDICTIONS = 40
SEED = 1

pytestmark = pytest.mark.slow


def test_every_promise_is_kept_while_lambda_throttles(record_property: Recorded) -> None:
    with faulty_stack(concurrency=CONCURRENCY) as (cloud, proxy), Crowd(cloud, proxy, SEED) as crowd:
        everything_at_once(crowd, PREDICTIONS)
        broken, refused = verdict(crowd.evidence()), throttled(cloud)
    record_property("invocations that Lambda throttled", refused)
    assert not broken, f"{broken}\n\nmake faults PREDICTIONS={PREDICTIONS} SEED={SEED} CONCURRENCY={CONCURRENCY}"
    assert refused, "nothing was throttled"
