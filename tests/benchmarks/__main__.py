"""`make bench`: the import time of a cold start, the cost of a prediction, of a batch's line, of looking at one, of
copying its files, of its webhooks, and how soon its completion is visible.

No time is asserted: the numbers are this machine's. The command fails if a prediction fails, or takes more steps than
the project promises.
"""

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

from local.cloud import LocalCloudError
from local.terminal import Terminal
from tests.benchmarks import batch, copying, figures, imports, prices, visible, watched, webhook
from tests.benchmarks.figures import Figures, Run, Sync
from tests.benchmarks.imports import EMPTY, ONE_CLIENT, OURS, PARTS, Loaded
from tests.benchmarks.report import BenchmarkFailed, bars, note, table

AUTHORIZER = "authorize_request"
# What a prediction that a webhook completes takes at most, without the authorizer, which runs once a minute for a token
# whatever is asked; and what each poll adds: the poll's state, function and
# question, then the wait whose new task token is a write.
STATES, FUNCTIONS, WRITES = 2, 6, 8
# What the stack may add to the time in which Replicate answers a create that waits.
SYNC_MS = 100
STATES_PER_POLL, FUNCTIONS_PER_POLL, WRITES_PER_POLL = 2, 1, 1

# `make batch` runs longer ones.
BATCH_LINES = 40

# One whole virtual processor; a function has its memory's share of one.
# https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
ONE_PROCESSOR_MB = 1769


def main() -> int:
    """Run all parts; return the exit status."""
    terminal = Terminal(sys.stdout)
    # As Ctrl-C does: what was started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began = time.monotonic()
    try:
        terminal.title("1. Imports of a cold start")
        _show_imports(terminal, imports.measure(terminal.step))
        terminal.title("2. Steps of a prediction")
        found, sync = figures.measure(terminal.step)
        _show_figures(terminal, found)
        _show_sync(terminal, sync)
        kept = _show_promise(terminal, found)
        terminal.title(f"3. Cost of 1,000 predictions on AWS ({prices.REGION}, arm64), without Replicate's own price")
        _show_costs(terminal, found)
        terminal.title("4. Steps of a batch's line")
        batch.show(terminal, batch.measure(BATCH_LINES, terminal.step))
        terminal.title("5. A prediction that its caller looks at while it runs")
        watched.show(terminal, watched.measure(), watched.measure(looks=False))
        terminal.title("6. Copying a file over TLS")
        copying.show(terminal, copying.measure(terminal.step))
        terminal.title("7. From completion to visible")
        visible.show(terminal, visible.measure(terminal.step))
        terminal.title("8. A webhook on a warm function")
        webhook.show(terminal, webhook.measure(terminal.step))
    except (BenchmarkFailed, LocalCloudError) as error:
        terminal.refuse(str(error))
        return 1
    terminal.write()
    if not kept:
        terminal.refuse("a prediction takes more steps than promised (see 2.)")
        return 1
    terminal.succeed(f"measured in {time.monotonic() - began:.0f} s")
    return 0


def _show_imports(terminal: Terminal, loaded: dict[str, Loaded]) -> None:
    empty, client = loaded[EMPTY].process_ms, loaded[ONE_CLIENT].process_ms
    terminal.write()
    terminal.write(
        table(
            ("handler", "ms", "slowest", "x empty", "x client", "import ms", "modules"),
            [
                (
                    name,
                    f"{each.process_ms:.0f}",
                    f"{each.slowest_ms:.0f}",
                    f"{each.process_ms / empty:.1f}",
                    f"{each.process_ms / client:.2f}",
                    f"{each.import_ms:.0f}",
                    f"{each.modules}",
                )
                for name, each in loaded.items()
            ],
        )
    )
    terminal.write(
        note(
            "ms: CPU milliseconds from the start of Python until the handler can be called, the median of "
            f"{imports.ROUNDS} processes, with the layer's own packages and bytecode. On Lambda, Python and its "
            "runtime interface have started before: there a function adds only the import ms."
        )
    )
    terminal.write()
    terminal.write(bars({name: each.process_ms for name, each in loaded.items()}))
    terminal.write()
    terminal.write("  Import ms by part (shares of a profile)")
    shown = [part for part in PARTS if any(each.parts[part] >= 1 for each in loaded.values())]
    terminal.write(
        table(
            ("handler", *shown),
            [(name, *(_count(round(each.parts[part])) for part in shown)) for name, each in loaded.items()],
        )
    )
    terminal.write(
        note(
            "The standard library counts for the first importer. pt-: Powertools; "
            f"{OURS}: our modules, and creating clients of AWS."
        )
    )


def _show_figures(terminal: Terminal, found: list[Figures]) -> None:
    names = [each.case.name for each in found]
    counted = [each.counted for each in found]
    functions = sorted({name for run in counted for name in run.invocations})
    operations = sorted({f"{call.service} {call.operation}" for run in counted for call in run.calls})
    upstream = sorted({call for run in counted for call in run.upstream})
    rows = [
        ("POST to 201, ms *", *(_median(each, "created_ms") for each in found)),
        ("POST to visible completion, ms *", *(_median(each, "ended_ms") for each in found)),
        ("  of which the model, ms *", *(_median(each, "model_ms") for each in found)),
        ("functions run", *(str(sum(run.invocations.values())) for run in counted)),
        *((f"  {name}", *(_count(run.invocations[name]) for run in counted)) for name in functions),
        ("billed ms, warm *", *(_lambda_ms(each) for each in found)),
        ("states entered", *(str(len(run.states)) for run in counted)),
        ("  of which for polls", *(_count(run.polls * STATES_PER_POLL) for run in counted)),
        ("item writes (stream)", *(str(run.writes) for run in counted)),
        ("  of the limiter, in addition", *(_count(run.limiter_writes) for run in counted)),
        ("  requested, including rejected ones", *(str(run.asked_writes) for run in counted)),
        ("  bytes of the items", *(f"{run.written_bytes:,}" for run in counted)),
        ("  billed units, with indexes", *(str(_write_units(run)) for run in counted)),
        ("requests to AWS by functions", *(str(len(run.calls)) for run in counted)),
        *(
            (f"  {name}", *(_count(sum(f"{c.service} {c.operation}" == name for c in run.calls)) for run in counted))
            for name in operations
        ),
        ("requests to Replicate", *(str(sum(run.upstream.values())) for run in counted)),
        *((f"  {name}", *(_count(run.upstream[name]) for run in counted)) for name in upstream),
        ("webhooks delivered", *(str(sum(run.webhooks.values())) for run in counted)),
        ("bytes of files", *(f"{run.file_bytes:,}" for run in counted)),
        ("bytes logged", *(f"{run.log_bytes:,}" for run in counted)),
    ]
    terminal.write()
    terminal.write(table(("one prediction", *names), rows))
    terminal.write(
        note(
            "*: median of the timed warm runs. The rest is counted in one run with a new access token, so that the "
            "authorizer runs too (API Gateway caches its response for 60 s), and with every request of the functions "
            f"to AWS recorded. Polls come after {figures.POLL_SECONDS} s here; by default after 60 s, then "
            "every 600 s. Each AwaitWebhook writes one item, without a function. Units count task tokens of "
            f"{figures.TASK_TOKEN_CHARACTERS:,} characters, AWS's longest."
        )
    )
    terminal.write()
    terminal.write("  POST to visible completion, ms")
    timed = [each for each in found if each.timed]
    terminal.write(bars({each.case.name: median(run.ended_ms for run in each.timed) for each in timed}))
    lambda_ms: dict[str, list[float]] = {}
    for run in timed[0].timed:
        for name, ms in run.lambda_ms.items():
            lambda_ms.setdefault(name, []).append(ms)
    terminal.write()
    terminal.write(f"  Billed ms by function, {timed[0].case.name}")
    terminal.write(bars({name: median(values) for name, values in lambda_ms.items()}))


def _show_sync(terminal: Terminal, sync: Sync) -> None:
    added = [through - direct for direct, through in zip(sync.direct, sync.stack, strict=True)]
    rows = [
        (name, f"{median(times):,.0f}", f"{max(times):,.0f}")
        for name, times in (("Replicate's stand-in", sync.direct), ("the stack", sync.stack), ("added", added))
    ]
    terminal.write()
    terminal.write(table(("Prefer: wait, POST to completion without files, ms", "median", "slowest"), rows))
    terminal.write(
        note(f"{len(added)} pairs on warm functions. The goal is at most {SYNC_MS} ms, including machine and emulator.")
    )


def _show_promise(terminal: Terminal, found: list[Figures]) -> bool:
    """Show the figures that are promised, of every run, beside the promise; return whether it is kept."""
    kept = True
    rows = []
    for each in found:
        polls = max(run.polls for run in each.runs)
        states = max(len(run.states) - STATES_PER_POLL * run.polls for run in each.runs)
        functions = max(_functions(run) - FUNCTIONS_PER_POLL * run.polls for run in each.runs)
        writes = max(run.writes - WRITES_PER_POLL * run.polls for run in each.runs)
        within = states <= STATES and functions <= FUNCTIONS and writes <= WRITES
        promised = each.case.completed
        kept = kept and (within or not promised)
        verdict = ("kept" if within else "BROKEN") if promised else "not promised" + (", kept" if within else "")
        rows.append((each.case.name, str(polls), str(states), str(functions), str(writes), verdict))
    terminal.write(
        note(
            f"A prediction that a webhook completes enters at most {STATES} states (1 without files, if the webhook "
            f"comes after its execution has begun to wait), runs at most {FUNCTIONS} "
            f"functions, not counting the authorizer, and writes at most {WRITES} items. Each poll adds "
            f"{STATES_PER_POLL} states, {FUNCTIONS_PER_POLL} function and {WRITES_PER_POLL} write. The table shows the "
            "maximum of all runs, without the additions of polls, and without the limiter's write for a create within "
            "ten seconds of another."
        )
    )
    rows.append(("at most", "", str(STATES), str(FUNCTIONS), str(WRITES), ""))
    terminal.write()
    terminal.write(table(("", "polls", "states", "functions", "item writes", ""), rows))
    return kept


def _functions(run: Run) -> int:
    return sum(count for name, count in run.invocations.items() if name != AUTHORIZER)


def _show_costs(terminal: Terminal, found: list[Figures]) -> None:
    terminal.write()
    used = {each.case.name: _units(each) for each in found}
    costs = {name: prices.cost(units) for name, units in used.items()}
    rows = [
        *(
            (
                price,
                f"${of.dollars:.10f}".rstrip("0").ljust(5, "0"),
                f"{of.per:,}",
                of.unit,
                *(f"{costs[name][price]:.5f}" for name in used),
            )
            for price, of in prices.PRICES.items()
        ),
        ("total, dollars", "", "", "", *(f"{sum(costs[name].values()):.4f}" for name in used)),
    ]
    terminal.write(table(("", "price", "per", "unit", *used), rows))
    first = found[0].case.name
    terminal.write()
    terminal.write(f"  Dollars for 1,000 predictions: {first}")
    largest = dict(sorted(costs[first].items(), key=lambda pair: -pair[1]))
    terminal.write(bars({name: dollars for name, dollars in largest.items() if dollars >= 0.00005}, "{:.4f}"))
    terminal.write()
    terminal.write("  Together")
    terminal.write(bars({name: sum(each.values()) for name, each in costs.items()}, "{:.4f}"))
    terminal.write(
        note(
            "Assumptions: warm functions that take as long as here, on a whole processor, with an emulator for AWS. If "
            "all of that were computing, then on the share of a processor that Lambda gives for their memory it would "
            f"cost ${_all_computing(found[0]):.4f} instead of ${costs[first]['Lambda time']:.4f} ({first}). A case "
            "that is not timed has the Lambda time of its one run, where simultaneous webhooks may have started a "
            f"second process. Files are stored for {prices.STORED_DAYS} days. A state transition is a state entered. "
            "API requests are the create and the webhooks; each GET of a caller adds one, and its function. Standard "
            "SSM parameters and sending task tokens are free. Not included: downloads ($0.09 per GB to the internet), "
            "cold starts, the free tier, and the cost of the stack without predictions (three secrets, the sweep each "
            "minute, metrics, alarms)."
        )
    )
    terminal.write(note("Prices: " + ", ".join(sorted({price.source for price in prices.PRICES.values()}))))


def _units(each: Figures) -> dict[str, float]:
    run = each.counted
    operations = [call.operation for call in run.calls if call.service == "s3"]
    reads = sum(name in ("GetObject", "HeadObject") for name in operations)
    return {
        "API requests": 1 + sum(run.webhooks.values()),
        "Lambda requests": sum(run.invocations.values()),
        "Lambda time": _gigabyte_seconds(each),
        "State transitions": len(run.states),
        "DynamoDB writes": _write_units(run),
        "DynamoDB reads": sum(call.read_units for call in run.calls),
        "S3 writes": len(operations) - reads,
        "S3 reads": reads,
        "S3 storage": run.file_bytes / 2**30 * prices.STORED_DAYS / 30,
        "Events": 2,  # its start and its end
        "Logs": run.log_bytes / 2**30,
        "Secrets": sum(call.service == "secretsmanager" for call in run.calls),
    }


def _write_units(run: Run) -> int:
    refused = sum(call.writes and bool(call.error) for call in run.calls)
    return run.write_units + refused  # a status item is smaller than 1 KB, mostly


def _gigabyte_seconds(each: Figures) -> float:
    return _with_authorizer(
        [run.gigabyte_seconds for run in each.timed or (each.counted,)], each.counted.gigabyte_seconds
    )


def _all_computing(each: Figures) -> float:
    """Dollars for 1,000 predictions if each function computed all the time: GB-seconds then do not depend on memory."""
    seconds = _with_authorizer([run.lambda_ms for run in each.timed], each.counted.lambda_ms) / 1000
    price = prices.PRICES["Lambda time"]
    return 1000 * seconds * ONE_PROCESSOR_MB / 1024 * price.dollars / price.per


def _with_authorizer(runs: Sequence[Mapping[str, float]], counted: Mapping[str, float]) -> float:
    """The runs' median of all functions together; mostly they went without the authorizer, whose answer was kept."""
    others = median(sum(used for name, used in run.items() if name != AUTHORIZER) for run in runs)
    return others + counted[AUTHORIZER]


def _median(each: Figures, name: str) -> str:
    return f"{median(getattr(run, name) for run in each.timed):,.0f}" if each.timed else "-"


def _lambda_ms(each: Figures) -> str:
    return f"{median(sum(run.lambda_ms.values()) for run in each.timed):,.0f}" if each.timed else "-"


def _count(number: int) -> str:
    return str(number) if number else "·"


if __name__ == "__main__":
    sys.exit(main())
