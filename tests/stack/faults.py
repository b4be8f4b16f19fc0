"""The deployed stack under faults: ``python -m tests.stack.faults``, ``make faults``.

--predictions N      so many, mixed, with everything wrong at once; figures to standard output
--concurrency N      how many functions the account runs at once: 10 in a new one
--seed N             decides what is asked for and what goes wrong
--call "…" --fault … one call of a function struck by one fault, in a stack where nothing else goes wrong
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from local.cloud import CONCURRENCY, LocalCloud
from tests.stack.audit import Request, verdict
from tests.stack.crowd import (
    PARAMETERS,
    REPLICATES_FAULTS,
    Crowd,
    album,
    blob,
    crasher,
    figures,
    mixed,
    sleeper,
    storyteller,
)
from tests.support.aws_proxy import AwsProxy, Call, Fault, proxied

SHARES = {
    Fault.KILLED_BEFORE: 0.004,
    Fault.KILLED_AFTER: 0.004,
    Fault.LOST: 0.008,
    Fault.REFUSED: 0.004,
    Fault.THROTTLED: 0.004,
}
"""What part of all calls of AWS each fault happens to, when everything is wrong at once."""

ON_THE_WAY = {
    "start_prediction", "start_from_queue", "submit_prediction", "poll_prediction", "receive_webhook", "copy_outputs",
    "cancel_prediction", "sweep_predictions", "publish_changes", "deliver_webhook",
}  # fmt: skip
"""The functions that a prediction passes through."""


@contextmanager
def faulty_stack(
    say: Callable[[str], None] = lambda _: None, concurrency: int = CONCURRENCY
) -> Iterator[tuple[LocalCloud, AwsProxy]]:
    """A deployed stack with a proxy at its AWS, in an account with that concurrency."""
    with LocalCloud(parameters=PARAMETERS, concurrency=concurrency, say=say) as cloud, proxied(cloud) as proxy:
        yield cloud, proxy


# -- one thing at a time ------------------------------------------------------------------------------------------


def situations(crowd: Crowd, number: int) -> Iterator[Request]:
    """A request for each way through the stack."""
    key = itertools.count()

    def keyed(body: dict[str, object], **more: object) -> Request:
        # Killed at each of its calls, before and after, and asked again each time.
        return Request(crowd.mark(), "http with key", body, f"key-{crowd.mark()}-{next(key)}", tries=60, **more)  # type: ignore[arg-type]

    def queued(body: dict[str, object], **more: object) -> Request:
        body["model"] = body.pop("version")
        return Request(crowd.mark(), "queue", body, **more)  # type: ignore[arg-type]

    crowd.cloud.replicate.fault("webhook_lost", times=None, model="local/album")
    crowd.cloud.replicate.fault("webhook_lost", times=None, model="local/crasher")
    crowd.cloud.replicate.fault("create_accepted_then_reset", model="local/crasher")
    # Its execution is stopped: the sweep starts the next one.
    yield keyed(sleeper(crowd.mark(), 5 + number % 2))
    # It is polled while it runs and logs, in every round: the one before may only be looked at when it has ended.
    yield keyed(sleeper(crowd.mark(), 7))
    yield keyed(blob(crowd.mark()))
    # It has not begun at Replicate when it is canceled: the end is in the answer to that.
    crowd.cloud.replicate.fault("start_late", times=None, model="local/storyteller", seconds=120)
    for _ in range(2):
        yield keyed(storyteller(crowd.mark()), cancel_after_seconds=1.0)
    yield keyed({**sleeper(crowd.mark()), "webhook": crowd.receiver.url})
    yield keyed(crasher(crowd.mark()))
    # Told twice: the second time, its execution is there.
    yield queued(sleeper(crowd.mark(), 3), key=f"key-{crowd.mark()}-{next(key)}", again=True)
    for _ in range(2):
        yield queued(sleeper(crowd.mark()))
        yield queued(album(crowd.mark()))
        yield queued(blob(crowd.mark()))
        yield queued(album(crowd.mark()))
        yield keyed(album(crowd.mark()))


def one_round(crowd: Crowd, number: int = 0, *, seconds: float = 600) -> None:
    """Asks for predictions on each way through the stack, and waits until all have ended."""
    first = len(crowd.requests)
    for request in situations(crowd, number):
        crowd.ask(request)
    stopped = crowd.requests[first]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (stopped.ids and crowd.stop_execution(next(iter(stopped.ids)))):
        time.sleep(0.1)
    crowd.settle(seconds)


def strike_each(crowd: Crowd, rounds: int, say: Callable[[str], None] = lambda _: None) -> list[Call]:
    """Has the function killed before and after each call that a clean round makes on a prediction's way.

    A call that only reads is struck before it: what is left behind after it is the same.

    Returns:
        These calls. What could not be struck in so many rounds is still armed.
    """
    one_round(crowd)
    calls = sorted(call for call in crowd.proxy.seen if call.function in ON_THE_WAY)
    for call in calls:
        for fault in call.kills:
            crowd.proxy.arm(call, fault)
    for number in range(rounds):
        # Some calls are made by a new process only.
        crowd.make_cold({call.function for call, _ in crowd.proxy.armed()})
        one_round(crowd, number)
        say(f"round {number + 1}: {len(crowd.proxy.armed())} kills at {len(calls)} calls are left")
        if not crowd.proxy.armed():
            break
    return calls


# -- everything at once ---------------------------------------------------------------------------------------------


FAULTS_GO_ON_SECONDS = 45


def everything_at_once(
    crowd: Crowd, predictions: int, say: Callable[[str], None] = lambda _: None, seconds: float = 900
) -> float:
    """Asks for so many predictions while everything is wrong, and waits until all have ended.

    Args:
        crowd: Who asks.
        predictions: How many.
        say: Called with progress.
        seconds: How long all may take to end when the faults have ceased, a while after the last one was asked for.

    Returns:
        The seconds until all had ended.
    """
    began = time.monotonic()
    crowd.proxy.disturb(SHARES, crowd.seed)
    for number in range(predictions):
        if crowd._random.random() < 0.5:
            crowd.cloud.replicate.fault(**crowd._random.choice(REPLICATES_FAULTS))
        crowd.ask(mixed(crowd))
        while len(crowd.requests) - crowd.asked() > 8:
            time.sleep(0.05)
        if number % 20 == 19:
            say(f"{number + 1} of {predictions} asked for, {len(crowd.proxy.strikes)} faults of AWS")
    # Most end while it all goes on; what is struck again and again does so when it has ceased.
    crowd.left(FAULTS_GO_ON_SECONDS, say)
    crowd.proxy.calm()
    crowd.cloud.replicate.reset()
    crowd.settle(seconds, say)
    return time.monotonic() - began


def main() -> int:
    """Run; return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.stack.faults", description=__doc__)
    parser.add_argument("--predictions", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--call")
    parser.add_argument("--fault", type=Fault, choices=list(Fault), default=Fault.KILLED_AFTER)
    arguments = parser.parse_args()
    began = time.monotonic()

    said = [0.0]

    def say(text: str) -> None:
        if time.monotonic() > said[0] + 2:
            said[0] = time.monotonic()
            print(f"{said[0] - began:6.1f} s  {text[:110]}", flush=True)

    with faulty_stack(say, arguments.concurrency) as (cloud, proxy), Crowd(cloud, proxy, arguments.seed) as crowd:
        try:
            if arguments.call:
                function, operation, *item = arguments.call.split(" ")
                proxy.arm(Call(function, operation, *item), arguments.fault)
                one_round(crowd)
            else:
                took = everything_at_once(crowd, arguments.predictions, say, 60 + arguments.predictions)
                print(f"{took:>8,.0f}  seconds until all had ended")
        except AssertionError as error:
            print(str(error).partition("\n")[0])
        evidence = crowd.evidence()
        broken = verdict(evidence)
        for name, count in figures(crowd, evidence).items():
            print(f"{count:>8,}  {name}")
    print(f"\n{broken or 'every promise was kept'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
