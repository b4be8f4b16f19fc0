"""Dollars for 1,000 predictions, from what was counted: the tables of `make bench`, of docs/cost.md and its picture.

    python -m tests.benchmarks.cost_page

writes docs/cost.md and docs/cost.svg from `counted.json`, without counting again: after a change of a price, of an
assumption or of a function's memory.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from pathlib import Path

from local.terminal import Terminal
from tests.benchmarks.prices import PRICES, STORED_DAYS, Price
from tests.benchmarks.report import note, table
from tests.support.template import ROOT, load_template, logical_name

COUNTED = Path(__file__).parent / "counted.json"
PAGE, PICTURE = ROOT / "docs/cost.md", ROOT / "docs/cost.svg"

ONE_FILE, NO_FILE, QUEUE, BATCH = "one file", "no file", "one file, by queue", "one file, a batch's line"
POLLED = "one file, polled once"
LENGTHS = (10, 60)
"""Seconds that models take."""
FULL_PROCESSOR_MB = 1769
"""A function has a whole virtual processor at this memory, and below it a share of one in proportion.

https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
"""
SIZES_MB = (256, 352, 384, 512, 1024)
COPY_SIZES_MB = (128, 256, 352, 512, 1024)
COPY_LIMIT_SECONDS = 900
"""The timeout of copy_outputs."""
TOKEN_CHARACTERS = 1024
"""Of a task token: those that AWS's documentation and samples show have up to 750, and the longest allowed 2,048."""
PEER_MB = 512

# What is assumed of others: milliseconds until they have answered.
CREATE_MS, GET_MS, FILE_MS, AWS_MS = 500, 100, 1000, 10

# https://aws.amazon.com/lambda/pricing/, "durable functions": an operation is a start, a step or a wait.
DURABLE = {
    "Durable operations": Price(8.00, 1_000_000, "operations", "https://aws.amazon.com/lambda/pricing/"),
    "Durable data": Price(0.25, 1, "GB written", "https://aws.amazon.com/lambda/pricing/"),
}
DURABLE_BYTES = 1024
"""Written by each operation: its input, its result and its state. Assumed."""


def run_of(length: int) -> str:
    """Name the case of an official client's `run()` for a model that takes so many seconds."""
    return f"one file, run() of {length} s"


@dataclass(frozen=True)
class Used:
    """What one prediction takes.

    Attributes:
        counts: Of everything but functions, by name.
        functions: By function: `runs`, `cpu_ms` of a whole processor in all of them, `requests` to AWS, `creates`,
            `gets` and `files` asked of Replicate, and `held_seconds`, in which a run waits for a model.
    """

    counts: Mapping[str, float]
    functions: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Function:
    """What one function needs.

    Attributes:
        peak_mb: Peak of its resident memory in the cases, MiB.
        import_ms: CPU milliseconds of its import.
        largest_mb: Peak of its memory with the largest answer of Replicate that is accepted, MiB; 0 if it reads none.
    """

    peak_mb: int
    import_ms: int
    largest_mb: int = 0


@dataclass(frozen=True)
class Counted:
    """All that was counted: by case or peer, and by function; and the CPU of copying 500 MiB over TLS, in seconds."""

    cases: Mapping[str, Used]
    functions: Mapping[str, Function]
    copy_seconds: float = 0.0

    @classmethod
    def load(cls, path: Path = COUNTED) -> "Counted":
        """Read what was stored."""
        stored = json.loads(path.read_text())
        return cls(
            {name: Used(**each) for name, each in stored["cases"].items()},
            {name: Function(**each) for name, each in stored["functions"].items()},
            stored.get("copy_seconds", 0.0),
        )

    def store(self, path: Path) -> None:
        """Store it."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


@cache
def memory_mb(function: str) -> int:
    """Return the memory of a function of the template, or of a peer."""
    if " " in function:
        return PEER_MB
    return int(load_template()["Resources"][logical_name(function)]["Properties"]["MemorySize"])


def billed_ms(used: Mapping[str, float], megabytes: int) -> float:
    """Return the milliseconds that are billed for a function's runs: its waiting, and its computing at its share."""
    waiting = CREATE_MS * used["creates"] + GET_MS * used["gets"] + FILE_MS * used["files"] + AWS_MS * used["requests"]
    return waiting + 1000 * used["held_seconds"] + used["cpu_ms"] * max(1.0, FULL_PROCESSOR_MB / megabytes)


def gigabyte_seconds(functions: Mapping[str, Mapping[str, float]]) -> float:
    """Return the gigabyte-seconds of functions at their memory."""
    return sum(billed_ms(used, memory_mb(name)) / 1000 * memory_mb(name) / 1024 for name, used in functions.items())


def units(used: Used) -> dict[str, float]:
    """Return what is billed for one prediction, by name of its price."""
    counts = used.counts
    return {
        "API requests": counts["api_requests"],
        "Lambda requests": sum(each["runs"] for each in used.functions.values()),
        "Lambda time": gigabyte_seconds(used.functions),
        "State transitions": counts["states"],
        "DynamoDB writes": counts["write_units"],
        "DynamoDB reads": counts["read_units"],
        "S3 writes": counts["s3_writes"],
        "S3 reads": counts["s3_reads"],
        "S3 storage": counts["stored_bytes"] / 2**30 * STORED_DAYS / 30,
        "Queue requests": counts["queue_requests"],
        "Events": counts["events"],
        "Logs": counts["log_bytes"] / 2**30,
        "Secrets": counts["secrets"],
    }


def durable(counted: Counted, length: int) -> tuple[Used, dict[str, float]]:
    """Count the peer of durable functions by hand: the steps of the loop, in one function that is run again and again.

    One operation each for the start, the create, each wait of five seconds, each question and the file; each wait ends
    a run, and the next run replays what was done. Questions are as many as the state machine's loop asked.
    """
    loop = counted.cases[f"loop {length}"]
    steps = {name.rpartition(" ")[2]: used for name, used in loop.functions.items()}
    asked = steps["get"]["runs"]
    together = {key: sum(used[key] for used in steps.values()) for key in steps["get"]}
    function = {**together, "runs": 1 + asked}
    operations = 3 + 2 * asked
    used = Used({**loop.counts, "states": 0}, {f"durable {length}": function})
    return used, {"Durable operations": operations, "Durable data": operations * DURABLE_BYTES / 2**30}


def dollars(found: Mapping[str, float]) -> dict[str, float]:
    """Return the dollars for 1,000 predictions, by name of the price."""
    prices = {**PRICES, **DURABLE}
    return {name: 1000 * number * prices[name].dollars / prices[name].per for name, number in found.items()}


@dataclass(frozen=True)
class Line:
    """One line of the comparison: its name, whether it is ours, and its dollars by name of the price."""

    name: str
    ours: bool
    dollars: Mapping[str, float]

    @property
    def total(self) -> float:
        """Return all of them."""
        return sum(self.dollars.values())


def lines(counted: Counted) -> list[Line]:
    """Return every case and every peer."""
    ours = (NO_FILE, ONE_FILE, POLLED, QUEUE, BATCH, *map(run_of, LENGTHS))
    found = [Line(name, True, dollars(units(counted.cases[name]))) for name in ours]
    for length in LENGTHS:
        used, more = durable(counted, length)
        found += [
            Line(f"Lambda that waits, {length} s", False, dollars(units(counted.cases[f"wait {length}"]))),
            Line(f"Step Functions loop, {length} s", False, dollars(units(counted.cases[f"loop {length}"]))),
            Line(f"durable function, {length} s", False, dollars({**units(used), **more})),
        ]
    return found


SHOWN = {
    "states": ("State transitions",),
    "functions": ("Lambda time", "Lambda requests", "Durable operations", "Durable data"),
    "table": ("DynamoDB writes", "DynamoDB reads"),
    "S3": ("S3 storage", "S3 writes", "S3 reads"),
    "API": ("API requests",),
    "others": ("Queue requests", "Events", "Logs", "Secrets"),
}
"""Columns of the comparison, and the prices in each."""


def compared(counted: Counted) -> list[tuple[str, ...]]:
    """Return the rows of the comparison."""
    return [
        (
            each.name,
            *(f"{sum(each.dollars.get(price, 0.0) for price in prices):.4f}" for prices in SHOWN.values()),
            f"{each.total:.3f}",
        )
        for each in lines(counted)
    ]


def one_call(counted: Counted, function: str) -> Mapping[str, float]:
    """Return what one run of a function takes, in the first case that runs it."""
    for name in (ONE_FILE, NO_FILE, QUEUE, POLLED, BATCH, *map(run_of, LENGTHS)):
        if used := counted.cases[name].functions.get(function):
            return {key: value / used["runs"] for key, value in used.items()}
    raise LookupError(function)


def sizes(counted: Counted) -> list[tuple[str, ...]]:
    """Return the rows of the memory table: billed milliseconds and cost of a run at each size."""
    rows = []
    price = PRICES["Lambda time"].dollars
    for function, needs in sorted(counted.functions.items()):
        try:
            used = one_call(counted, function)
        except LookupError:
            continue
        needed = max(needs.peak_mb, needs.largest_mb)
        at = [(megabytes, billed_ms(used, megabytes)) for megabytes in SIZES_MB]
        cold = needs.import_ms * max(1.0, FULL_PROCESSOR_MB / memory_mb(function))
        rows.append(
            (
                function,
                f"{used['cpu_ms']:.0f}",
                f"{needs.peak_mb}",
                f"{needs.largest_mb or '-'}",
                *(
                    f"{ms:,.0f} ms, ${1e6 * ms / 1000 * megabytes / 1024 * price / 1000:.4f}"
                    if megabytes > needed
                    else "too small"
                    for megabytes, ms in at
                ),
                f"{memory_mb(function)}",
                f"{cold:,.0f}" if needs.import_ms else "",
            )
        )
    return rows


HEADS = ("for 1,000 predictions", *SHOWN, "together")
SIZE_HEADS = (
    "function",
    "CPU ms",
    "peak MiB",
    "with the largest answer",
    *(f"{each} MB" for each in SIZES_MB),
    "chosen",
    "cold start, ms",
)


def show(terminal: Terminal, counted: Counted) -> None:
    """Show the comparison, and the memory of functions."""
    terminal.write()
    terminal.write(table(HEADS, compared(counted)))
    terminal.write(note(ASSUMED.replace("`", "")))
    terminal.write()
    terminal.write(table(SIZE_HEADS, sizes(counted)))
    terminal.write(
        note(
            "A run's CPU at a whole processor, the peak of its process here, and at each size its billed time and what "
            "1,000 runs cost. A cold start adds its import at the chosen size."
        )
    )


ASSUMED = (
    f"Assumed: Replicate answers a create after {CREATE_MS / 1000:g} s and a GET after {GET_MS / 1000:g} s, and sends "
    f"a file in {FILE_MS / 1000:g} s; AWS answers a request of a function after {AWS_MS} ms; and a function below "
    f"{FULL_PROCESSOR_MB:,} MB computes with "
    "[its share](https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html) of the processor on which "
    "`make bench` measured it. Functions are warm."
)


# -- the page ----------------------------------------------------------------------------------------------------------

SOURCES = {
    "State transitions": "[Step Functions]({source})",
    "Lambda time": "[Lambda]({source}), time",
    "Lambda requests": "Lambda, requests",
    "DynamoDB writes": "[DynamoDB]({source}), writes",
    "DynamoDB reads": "DynamoDB, reads",
    "S3 storage": "[S3]({source}), storage",
    "S3 writes": "S3, writes",
    "S3 reads": "S3, reads",
    "API requests": "[API Gateway]({source}), REST",
    "Logs": "[CloudWatch Logs]({source})",
    "Events": "[EventBridge]({source})",
    "Secrets": "[Secrets Manager]({source}), reads",
    "Queue requests": "[SQS]({source}), requests",
}
TIMES = "\N{MULTIPLICATION SIGN}"
LISTED = {1_000_000: "million", 1_000: "1,000", 10_000: "10,000"}
UNITS = {"Lambda time": "GB-s", "S3 storage": "GB-month", "Logs": "GB"}


def per_prediction(counted: Counted) -> list[tuple[str, ...]]:
    """Return the rows of the base case: each is a product, dearest first."""
    used = counted.cases[ONE_FILE]
    found = units(used)
    described = {
        "State transitions": "{:g} states entered",
        "Lambda time": "{:.2f} GB-s (a)",
        "Lambda requests": "{:g}",
        "DynamoDB writes": f"{used.counts['items_written']:g} items: {{:g}} units (b)",
        "DynamoDB reads": "{:g} units",
        "S3 writes": "{:g} PUT",
        "S3 reads": "{:g} HEAD or GET",
        "S3 storage": f"{used.counts['stored_bytes']:,.0f} bytes, {STORED_DAYS} days",
        "API requests": "{:g}: create, 2 webhooks, read",
        "Events": "{:g} events",
        "Logs": f"{used.counts['log_bytes']:,.0f} bytes",
    }
    rows, together = [], 0.0
    for name, cost in sorted(dollars(found).items(), key=lambda pair: -pair[1]):
        if cost < 0.00005 and name not in described:
            continue
        price = PRICES[name]
        each = f"{price.dollars / price.per:.12f}".rstrip("0")
        number = f"{1000 * found[name]:,.5f}".rstrip("0").rstrip(".")
        product = round(float(number.replace(",", "")) * float(each), 4)
        together += product
        listed = f"${price.dollars:.10f}".rstrip("0")
        listed = listed + "0" * max(0, 2 - len(listed.partition(".")[2]))
        rows.append(
            (
                SOURCES[name].format(source=price.source),
                described.get(name, "{:g}").format(found[name]),
                f"{listed} per {UNITS.get(name) or LISTED[price.per]}",
                f"{number} {TIMES} {each} = ${product:.4f}",
            )
        )
    return [*rows, ("**together**", "", "", f"**${together:.2f}**")]


def copying_sizes(counted: Counted) -> list[tuple[str, ...]]:
    """Return the rows of what copying 500 MiB takes at each size: seconds of its share, and the file that fits."""
    rows: list[tuple[str, ...]] = []
    for megabytes in COPY_SIZES_MB:
        seconds = counted.copy_seconds * max(1.0, FULL_PROCESSOR_MB / megabytes)
        fits = 500 / 1024 * COPY_LIMIT_SECONDS / seconds
        rows.append((f"{megabytes}", f"{seconds:,.1f}", f"{500 / seconds:,.0f}", f"{fits:,.0f}"))
    return rows


COPY_HEADS = ("MB", "seconds of its processor for 500 MiB", "MiB a second at most", "GiB within its 900 s")


def without_read(used: Used) -> Used:
    """Return what a prediction takes whose caller is told of the end, and does not GET it."""
    counts = {**used.counts, "api_requests": used.counts["api_requests"] - 1}
    counts["read_units"] -= 1
    return Used(counts, {name: each for name, each in used.functions.items() if name != "read_prediction"})


def blocks(counted: Counted) -> dict[str, str]:
    """Return the generated blocks of the page, by name."""
    return {
        "prediction": _markdown(("item", "for one prediction", "price", "for 1,000"), per_prediction(counted)),
        "assumed": ASSUMED,
        "compared": _markdown(HEADS, compared(counted)),
        "sizes": _markdown(SIZE_HEADS, sizes(counted)),
        "copying": _markdown(COPY_HEADS, copying_sizes(counted)),
    }


def page(text: str, counted: Counted) -> str:
    """Return the page with its generated blocks written again; the prose around them stays.

    Raises:
        ValueError: The page has no place for one.
    """
    for name, block in blocks(counted).items():
        begin, end = f"<!-- make bench WRITE=1: {name} -->", "<!-- end -->"
        found = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(found.findall(text)) != 1:
            raise ValueError(f"docs/cost.md has to have the line {begin} once, and {end} behind it")
        head, tail = found.split(text)
        text = f"{head}{begin}\n\n{block}\n\n{end}{tail}"
    return text


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = (f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in (heads, *rows))
    head, *others = shown
    return "\n".join((head, f"|{'---|' * len(heads)}", *others))


# -- the picture -------------------------------------------------------------------------------------------------------

_BAR, _NAME, _ROW = 560, 250, 26
_STYLE = """
    .page { fill: #ffffff; }
    .ours { fill: #d6487e; }
    .peer { fill: #afb8c1; }
    text { fill: #1f2328; font-size: 12.5px;
           font-family: -apple-system, BlinkMacSystemFont, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
    .name { text-anchor: end; }
    .title { font-size: 14px; font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; }
      .ours { fill: #e275a0; }
      .peer { fill: #545d68; }
      text { fill: #f0f6fc; }
    }
"""


def draw(counted: Counted) -> str:
    """Return the comparison as an SVG: a bar for each case and each peer."""
    found = lines(counted)
    largest = max(each.total for each in found)
    height = 64 + _ROW * len(found)
    drawn = []
    for number, each in enumerate(found):
        y, kind = 50 + _ROW * number, "ours" if each.ours else "peer"
        width = max(1.0, _BAR * each.total / largest)
        drawn += [
            f'  <text class="name" x="{_NAME}" y="{y + 14}">{escape(each.name)}</text>',
            f'  <rect class="{kind}" x="{_NAME + 10}" y="{y}" width="{width:.1f}" height="18"/>',
            f'  <text x="{_NAME + 16 + width:.1f}" y="{y + 14}">${each.total:.3f}</text>',
        ]
    title = "Dollars for 1,000 predictions"
    what = "; ".join(f"{each.name}: ${each.total:.3f}" for each in found)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_NAME + _BAR + 90} {height}" role="img"'
        ' aria-labelledby="title description">\n'
        f'  <title id="title">{title}</title>\n  <desc id="description">{escape(what)}</desc>\n'
        f"  <style>{_STYLE}  </style>\n"
        f'  <rect class="page" width="100%" height="100%"/>\n'
        f'  <text class="title" x="20" y="28">{title}: this stack, and what one would write instead</text>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def write(counted: Counted) -> None:
    """Write docs/cost.md and docs/cost.svg."""
    PAGE.write_text(page(PAGE.read_text(), counted))
    PICTURE.write_text(draw(counted))


if __name__ == "__main__":
    write(Counted.load())
    sys.exit(0)
