"""Which test shows which promise, and `make reliability`, which runs them all and writes docs/reliability.md.

Figures in the page are what tests record of themselves with pytest's `record_property` (schedules, cases, bytes); the
seconds are those of the run that wrote the page.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
SUITES = ("unit", "attacks", "simulation", "stack")
"""The make targets that run tests, as `make test` has them, each of a folder of the same name."""


OUT_OF_DATE = (
    "tests/unit/repository/test_reliability.py::test_page_has_every_promise_with_what_shows_it",
    "tests/unit/repository/test_readme.py::test_every_relative_link_leads_somewhere[docs/reliability.md]",
)
"""The tests that fail while the page has to be written again, as after a test's file was moved."""

Recorded = Callable[[str, object], None]
"""The type of pytest's fixture `record_property`: counts by what was counted, for the page."""


class NotShown(Exception):
    """A page cannot be written: a test failed, did not run, or is not there; the message says which."""


@dataclass(frozen=True)
class Shown:
    """What some tests show of a promise.

    Attributes:
        what: What holds, as a sentence without its full stop.
        tests: Ids of tests, of classes or of files; all parameters of a test are meant.
    """

    what: str
    tests: Sequence[str]


@dataclass(frozen=True)
class Promise:
    """A promise of the README, and what shows it."""

    text: str
    shown: Sequence[Shown]


@dataclass
class Ran:
    """What ran of some tests.

    Attributes:
        tests: How many.
        seconds: How long, all of them together.
        figures: What they have recorded, added up by name.
    """

    tests: int = 0
    seconds: float = 0.0
    figures: Counter[str] = field(default_factory=Counter)


PROMISES: Sequence[Promise] = (
    Promise(
        "Every accepted request ends in a terminal status",
        (
            Shown(
                "No schedule of losses, delays, duplicates, reorderings and crashes leaves a request open",
                ["tests/simulation/test_simulation.py::test_schedule_of_faults_breaks_no_promise"],
            ),
            Shown(
                "No named world does: batches, pipelines, trainings, webhooks, task tokens, owners who burden others",
                [
                    "tests/simulation/test_simulation.py::test_each_world_is_reached_and_breaks_no_promise",
                    "tests/simulation/test_simulation.py::test_worlds_of_unknown_creates_reach_each_situation",
                ],
            ),
            Shown(
                "The schedules detect each sabotage of the code",
                ["tests/simulation/test_simulation.py::test_sabotaged_code_breaks_a_promise_in_some_schedule"],
            ),
            Shown(
                "A fault before or after any call of AWS, in every state of a prediction",
                [
                    "tests/unit/lifecycle/test_faults.py::test_fault_at_any_call_to_aws_ends_with_at_most_one_create_bound_stored_and_told"
                ],
            ),
            Shown(
                "Deployed functions that are killed before and after each of their calls to AWS",
                [
                    "tests/stack/test_faults.py::test_each_call_of_each_function_is_survived_when_it_is_killed_before_and_after_it"
                ],
            ),
            Shown(
                "Predictions through every entry point with all faults at once, deployed",
                ["tests/stack/test_faults.py::test_every_promise_is_kept_while_everything_is_wrong"],
            ),
            Shown(
                "A third of the creates failing in each way, deployed: 95 of 100 end within four minutes",
                [
                    "tests/stack/test_predictions.py::TestSubmission::test_third_of_the_creates_failing_in_each_way_costs_a_minute_and_no_second_run"
                ],
            ),
            Shown(
                "Many simultaneous creates with an unknown outcome are decided within four minutes by few list calls",
                ["tests/unit/lifecycle/test_unknown_load.py"],
            ),
            Shown("The audit of these two detects tampering", ["tests/stack/test_faults.py::TestAudit"]),
            Shown(
                "Predictions continue through a deployment, and data of the first release is readable",
                ["tests/stack/test_upgrades.py"],
            ),
            Shown(
                "Checks that crash on an item delay no other item, back off, and end with it an hour past its deadline",
                ["tests/unit/lifecycle/test_sweep.py::TestDeadLooks"],
            ),
            Shown(
                "Responses of 12 and 60 MB in functions that are killed at their own memory and time limits",
                ["tests/attacks/test_answers.py"],
            ),
            Shown(
                "Polls replace lost webhooks",
                ["tests/stack/test_predictions.py::TestLostWebhooks"],
            ),
            Shown(
                "A bus or Step Functions that fail for hours lose nothing, and delay or repeat no webhook",
                ["tests/unit/notifications/test_stream.py::TestFailures"],
            ),
            Shown(
                "Each requested kind of webhook is sent, in every order of Replicate's webhooks",
                [
                    "tests/unit/notifications/test_webhook_queue.py::TestChanges::test_each_wanted_kind_is_told_in_every_order_of_replicates_webhooks"
                ],
            ),
        ),
    ),
    Promise(
        "One request pays for at most one prediction that runs to completion",
        (
            Shown(
                "The same key, message, object, schedule or state twice, concurrently or later",
                [
                    "tests/stack/test_predictions.py::TestSameRequest",
                    "tests/stack/test_queue.py::TestQueue",
                    "tests/stack/test_recipes.py::TestObjects",
                    "tests/unit/batches/test_batches.py::test_batch_whose_requests_two_calls_with_one_key_wrote_at_once_is_read",
                ],
            ),
            Shown(
                "A create with a lost response is found again, and sent again only on evidence that it started nothing",
                [
                    "tests/stack/test_predictions.py::TestSubmission",
                    "tests/stack/test_trainings.py",
                    "tests/unit/lifecycle/test_unknown_submissions.py",
                ],
            ),
            Shown(
                "No function that claims sends a request after the window of its claim, frozen and thawed or not",
                ["tests/unit/upstream/test_create_window.py"],
            ),
            Shown(
                "A reading of Replicate's list is evidence only if it is complete, whatever its entries contain",
                ["tests/unit/upstream/test_list_reader.py", "tests/unit/upstream/test_entry_scanner.py"],
            ),
            Shown(
                "The remaining limit: a create that Replicate accepts or lists after the second reading runs twice"
                " until it is detected and canceled",
                [
                    "tests/simulation/test_simulation.py::test_what_is_accepted_or_listed_after_the_second_reading_is_noticed_and_counted",
                    "tests/unit/lifecycle/test_unknown_submissions.py::TestWrong",
                ],
            ),
            Shown("A batch of 200 lines, canceled half-way and run again", ["tests/stack/test_batches.py"]),
            Shown(
                "A fault at any call of a new batch or pipeline creates exactly one; expired keys start new ones",
                ["tests/unit/lifecycle/test_once.py"],
            ),
            Shown(
                "Concurrent starts, in any order of their calls",
                ["tests/unit/lifecycle/test_submissions.py::TestStart"],
            ),
        ),
    ),
    Promise(
        "A terminal status never changes",
        (
            Shown(
                "Every order, with repetition, of up to seven webhooks of thirteen kinds",
                ["tests/attacks/test_webhooks.py::test_every_order_of_up_to_seven_events_ends_in_the_right_state"],
            ),
            Shown(
                "The merge rule, for any statuses and ids",
                [
                    "tests/unit/store/test_predictions.py::TestMerge",
                    "tests/unit/store/test_predictions.py::TestPayloads",
                ],
            ),
        ),
    ),
    Promise(
        "Every output file is in the bucket, byte for byte; a partial object is never visible",
        (
            Shown(
                "Bombs, endless, slow, short, false, mistyped responses: a reason, or exactly the bytes, in time",
                ["tests/attacks/test_downloads.py"],
            ),
            Shown(
                "Interrupted files are copied again; missing files are reported",
                ["tests/stack/test_predictions.py::TestFiles"],
            ),
            Shown(
                "The copier, its lease and its uploads",
                ["tests/unit/files/test_outputs_bucket.py", "tests/unit/lifecycle/test_archive_outputs.py"],
            ),
        ),
    ),
    Promise(
        "Strangers, other owners and forged webhooks get nothing",
        (
            Shown("Generated calls of two owners and a stranger to every route", ["tests/attacks/test_tenancy.py"]),
            Shown("Webhooks of every malformed kind, and with any one bit changed", ["tests/attacks/test_webhooks.py"]),
            Shown(
                "Private addresses in all notations, redirects, and names that change between check and connection",
                ["tests/attacks/test_addresses.py"],
            ),
            Shown(
                "No secret is in any log, item, object, event, message, history or response of the stack tests",
                ["tests/stack/test_secrecy.py"],
            ),
            Shown(
                "The deployed policies deny each function all other actions",
                ["tests/stack/test_permissions.py"],
            ),
            Shown(
                "A receiver that hangs delays another owner's webhook by less than half a minute",
                ["tests/unit/notifications/test_webhook_slots.py"],
            ),
            Shown("Each policy allows the calls of the code, and no more", ["tests/unit/repository/test_template.py"]),
            Shown(
                "Without a token of the right scope every request is rejected",
                [
                    "tests/stack/test_predictions.py::TestAccess",
                    "tests/unit/functions/test_events.py::test_a_sample_needs_one_of_the_scopes_that_are_described_and_no_other",
                ],
            ),
        ),
    ),
    Promise(
        "Bad input gets a clear response before any money is spent; limits are never exceeded",
        (
            Shown(
                "Hostile JSON at the API, the webhook, the queue, in manifests and from models",
                [
                    "tests/attacks/test_json.py",
                    "tests/unit/lifecycle/test_submissions.py::TestStart::test_refusal_of_any_size_ends_the_prediction_and_is_answered_alike_when_it_is_repeated",
                ],
            ),
            Shown(
                "Hostile schemas: bounded steps, linear-time patterns, nothing fetched",
                ["tests/attacks/test_schemas.py"],
            ),
            Shown("Inputs that violate the model's schema never reach Replicate", ["tests/stack/test_inputs.py"]),
            Shown(
                "Parallel starts by all entry points exceed neither an owner's limits nor the rate",
                ["tests/attacks/test_money.py"],
            ),
            Shown(
                "At 120 % of the rate at least 95 % of it starts in each minute, and owners share it",
                ["tests/unit/admission/test_lanes.py"],
            ),
            Shown(
                "Open batches and pipelines, attempts and rejected lines count against their owner's limits",
                ["tests/unit/admission/test_owner_bounds.py"],
            ),
            Shown("Every operation responds to any request as its document says", ["tests/stack/test_openapi.py"]),
        ),
    ),
    Promise(
        "A prediction takes at most 4 states, 6 functions and 8 writes, however long the model runs",
        (
            Shown("Items written, counted at the table", ["tests/unit/repository/test_figures.py"]),
            Shown(
                "States entered, according to the definition",
                [
                    "tests/unit/repository/test_state_machines.py::test_submitted_prediction_ends_by_webhook_in_one_state_and_with_files_in_two"
                ],
            ),
            Shown(
                "Functions run, counted in the deployed stack",
                ["tests/stack/test_queue.py::TestEvents::test_prediction_of_a_webhook_runs_six_functions_at_most"],
            ),
        ),
    ),
    Promise(
        "A caller who looks at a running prediction sees what Replicate shows, at most `LiveReadSeconds` old",
        (
            Shown("Logs and output grow while it runs, deployed", ["tests/stack/test_live_reads.py"]),
            Shown(
                "Whatever Replicate or the table does, a GET answers in time; no URL of Replicate and no deleted data",
                ["tests/unit/lifecycle/test_live_reads.py"],
            ),
            Shown(
                "The stack asks no more than its budget, and nothing while Replicate fails",
                ["tests/unit/admission/test_live_budget.py"],
            ),
            Shown(
                "Reads and writes of a watched prediction of ten seconds and of ten minutes",
                ["tests/simulation/test_watched.py"],
            ),
        ),
    ),
    Promise(
        "An operator sees failures and can fix them",
        (
            Shown("The commands of the runbook, on the deployed stack", ["tests/stack/test_commands.py"]),
            Shown("Pauses, limits and waiting turns", ["tests/stack/test_limits.py"]),
            Shown(
                "Dead letters are redriven, and start nothing twice",
                [
                    "tests/stack/test_queue.py",
                    "tests/stack/test_deliveries.py",
                    "tests/unit/cli/test_commands.py::test_dead_letter_of_every_hop_to_the_requests_queue_is_redriven",
                    "tests/unit/intake/test_queue.py::TestLargeRefused",
                    "tests/unit/intake/test_redelivery.py",
                ],
            ),
        ),
    ),
)
"""What the README promises, in the order of its promises, and last what an operator is promised."""


def read(report: Path) -> dict[str, Ran]:
    """What a JUnit report of pytest's tells, by id of the test without its parameters.

    Raises:
        NotShown: A test of it failed.
    """
    found: dict[str, Ran] = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # pytest has just written it
        name = _id(case.get("classname", ""), case.get("name", ""))
        if case.find("failure") is not None or case.find("error") is not None:
            raise NotShown(f"{name} failed.")
        if case.find("skipped") is not None:
            continue
        ran = found.setdefault(name, Ran())
        ran.tests += 1
        ran.seconds += float(case.get("time", "0"))
        for recorded in case.iter("property"):
            ran.figures[recorded.get("name", "")] += int(recorded.get("value", "0"))
    return found


def _id(classname: str, name: str) -> str:
    # "tests.unit.test_x.TestY" and "test_z[a::b]": the file is the longest part of it that is one.
    parts = classname.split(".")
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length]).with_suffix(".py")
        if (ROOT / path).is_file():
            return "::".join([path.as_posix(), *parts[length:], name.partition("[")[0]])
    raise NotShown(f"{classname}.{name} is in no file.")


def of(shown: Shown, ran: Mapping[str, Ran]) -> Ran:
    """What ran of the tests that show something.

    Raises:
        NotShown: One of them did not run.
    """
    total = Ran()
    for wanted in shown.tests:
        there = [each for name, each in ran.items() if name == wanted or name.startswith(f"{wanted}::")]
        if not there:
            raise NotShown(f"{wanted} did not run.")
        for each in there:
            total.tests += each.tests
            total.seconds += each.seconds
            total.figures += each.figures
    return total


def page(ran: Mapping[str, Ran], took: Mapping[str, float]) -> str:
    """The page.

    Args:
        ran: All tests by their ids.
        took: Seconds by suite, from beginning to end.
    """
    return "\n".join([*_head(ran, took), *_promises(ran)]) + "\n"


def _head(ran: Mapping[str, Ran], took: Mapping[str, float]) -> Iterable[str]:
    python = platform.python_version()
    tests = {suite: sum(each.tests for name, each in ran.items() if f"tests/{suite}/" in name) for suite in took}
    minutes = sum(took.values()) / 60
    yield f"""# Reliability: each promise and its tests

Written by `make reliability` on {datetime.now(UTC):%Y-%m-%d}, with Python {python} on {os.cpu_count()} cores:
{sum(tests.values()):,} tests in {minutes:.1f} minutes. `make test` and `make slow` run the same tests, after style,
types and template.
Longer runs: `make sim` (its figures are in [simulation.md](simulation.md)), `make faults`, `make batch`.

| command | tests | seconds |
|---|---:|---:|"""
    for suite, seconds in took.items():
        yield f"| `make {suite}` | {tests[suite]:,} | {seconds:,.0f} |"
    named = ", ".join(f'"{suite}"' for suite in took)
    yield f"""
```mermaid
xychart-beta
    title "Seconds from start to end"
    x-axis [{named}]
    y-axis "s"
    bar [{", ".join(f"{seconds:.0f}" for seconds in took.values())}]
```

Seconds in the tables below are the sums of the tests alone; several run side by side. To run a row's tests, pass its
second column to `.venv/bin/python -m pytest`."""


def _promises(ran: Mapping[str, Ran]) -> Iterable[str]:
    for number, promise in enumerate(PROMISES, 1):
        yield f"\n## {number}. {promise.text}\n\n| result | tests | figures | seconds |\n|---|---|---|---:|"
        for shown in promise.shown:
            total = of(shown, ran)
            figures = [f"{total.tests:,} {'test' if total.tests == 1 else 'tests'}"]
            figures += [f"{count:,} {name}" for name, count in total.figures.items()]
            tests = "<br>".join(f"[{_short(each)}](../{each.partition('::')[0]})" for each in shown.tests)
            yield f"| {shown.what} | {tests} | {', '.join(figures)} | {total.seconds:,.1f} |"


def _short(test: str) -> str:
    path, _, name = test.partition("::")
    return f"`{path}{'::' if name else ''}{name}`"


def main() -> int:
    """Run the suites, and write the page; with `--reports` what was run before.

    Returns:
        0, or 1 where a test failed or is missing: the page then stays as it was.
    """
    parser = argparse.ArgumentParser(prog="make reliability", description=main.__doc__)
    parser.add_argument("--reports", type=Path, default=ROOT / ".local" / "reliability", help="where reports are kept")
    reports: Path = parser.parse_args().reports
    reports.mkdir(parents=True, exist_ok=True)
    ran: dict[str, Ran] = {}
    took = {}
    try:
        for suite in SUITES:
            report = reports / f"{suite}.xml"
            # What is to be written now may still be out of date.
            options = shlex.join([f"--junitxml={report}", *(f"--deselect={test}" for test in OUT_OF_DATE)])
            environment = os.environ | {"PYTEST_ADDOPTS": options}
            began = time.monotonic()
            if subprocess.run(["make", suite, "SLOW=1"], cwd=ROOT, env=environment).returncode:
                raise NotShown(f"make {suite} failed.")
            took[suite] = time.monotonic() - began
            ran |= read(report)
        PAGE.write_text(page(ran, took))
    except NotShown as error:
        print(f"{PAGE.name} is not written: {error}", file=sys.stderr)
        return 1
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
