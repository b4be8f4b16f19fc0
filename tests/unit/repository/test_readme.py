"""What the README and the pages of docs/ say of the template, the Makefile and the repository is so."""

import re
from typing import Any

import pytest

from tests.support import library
from tests.support.pages import BLOCKS, PAGES, code, rows, section
from tests.support.template import ROOT, load_template, resources

PARAMETERS: dict[str, dict[str, Any]] = load_template()["Parameters"]


def named(page: str, title: str) -> list[str]:
    """What the first cells of a section's tables name as code."""
    return [name for row in rows(section(page, title)) for name in code(row[0])]


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def constant(path: str, name: str) -> int:
    """A number that a module gives a name, such as `5 * 1024 * 1024`; read, because handlers need a cloud to import."""
    found = re.search(rf"^{name} = ([0-9_.*+ ]+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert found, f"{path} has no number {name}"
    return int(eval(found[1]))  # noqa: S307  # digits and operators only


def test_table_of_parameters_names_those_of_the_template_and_no_others() -> None:
    found = [row[0].strip("`") for row in rows(section("docs/configuration.md", "Parameters"))]
    assert sorted(found) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_table_of_parameters_gives_the_default_and_the_bounds_of_the_template(name: str) -> None:
    parameter = PARAMETERS[name]
    (_, default, allowed, meaning), *_ = [
        row for row in rows(section("docs/configuration.md", "Parameters")) if row[0] == f"`{name}`"
    ]
    assert default == (f"`{parameter['Default']}`" if parameter["Default"] != "" else "empty")
    if "MinValue" in parameter:
        assert allowed == f"{parameter['MinValue']} to {parameter['MaxValue']}"
    elif "AllowedValues" in parameter:
        # Their order is of no meaning to CloudFormation.
        assert sorted(code(allowed)) == sorted(str(value) for value in parameter["AllowedValues"])
    else:
        assert allowed
    assert meaning


def test_table_of_outputs_names_those_of_the_template_and_no_others() -> None:
    assert sorted(named("docs/deploy.md", "Outputs")) == sorted(load_template()["Outputs"])


def test_table_of_routes_names_those_of_the_template_and_no_others() -> None:
    routes = [
        f"{event['Properties']['Method']} {event['Properties']['Path']}"
        for function in resources("AWS::Serverless::Function").values()
        for event in function["Properties"].get("Events", {}).values()
        if event["Type"] == "Api"
    ]
    assert sorted(named("docs/api.md", "Routes")) == sorted(routes)


RUNBOOK = BLOCKS.sub("", (ROOT / "docs/runbook.md").read_text())


def test_runbook_has_a_section_for_every_alarm_and_a_row_for_every_metric() -> None:
    sections = re.findall(r"^## (\w+Alarm)$", RUNBOOK, re.MULTILINE)
    assert sorted(sections) == sorted(resources("AWS::CloudWatch::Alarm"))
    sources = [*(ROOT / "functions").rglob("*.py"), *library.of_functions().values()]
    metrics = {
        name
        for source in sources
        for name in re.findall(r"(?:add_metric|single_metric)\(\s*name=\"(\w+)\"", source.read_text())
    }
    assert metrics
    table = RUNBOOK.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    assert {name for row in rows(table) for name in code(row[0])} == metrics


LIMITS = {
    "body of a request": ("layers/predictions/predictions/validation.py", "BODY_LIMIT_BYTES", 2**20, "{} MiB"),
    "body of a change that is passed on": (
        "layers/predictions/predictions/api/proxy.py",
        "CHANGE_LIMIT_BYTES",
        2**20,
        "{} MiB",
    ),
    "query that is passed on": (
        "layers/predictions/predictions/api/proxy.py",
        "QUERY_LIMIT_CHARACTERS",
        1,
        "{} characters",
    ),
    "response that is passed on": (
        "layers/predictions/predictions/api/proxy.py",
        "ANSWER_LIMIT_BYTES",
        1,
        "{:,} bytes",
    ),
    "age of a kept version of a model": (
        "layers/predictions/predictions/api/proxy.py",
        "VERSION_CACHE_SECONDS",
        1,
        "{} s",
    ),
    "nesting of JSON": ("layers/predictions/predictions/validation.py", "DEPTH_LIMIT", 1, "{} levels"),
    "a file in `POST /files`": (
        "layers/predictions/predictions/files/upload_requests.py",
        "CONTENT_LIMIT_BYTES",
        100_000,
        "4.4 MB",
    ),
    "a file by `POST /uploads`": (
        "layers/predictions/predictions/files/upload_requests.py",
        "UPLOAD_LIMIT_BYTES",
        2**30,
        "{} GiB",
    ),
    "page of the list of batches": ("functions/manage_batches/app.py", "PAGE_SIZE", 1, "{} batches"),
    "lines of a batch": (
        "layers/predictions/predictions/batches/manifest.py",
        "LINES_LIMIT",
        1,
        "{:,}; 1 MiB each, 1 GiB in all",
    ),
    "lines of a batch at once": (
        "layers/predictions/predictions/recipes/schema.py",
        "MAX_CONCURRENCY",
        1,
        "`max_concurrency`, {} at most",
    ),
    "deadline": (
        "layers/predictions/predictions/intents/model.py",
        "LIFETIME_LIMIT_SECONDS",
        24 * 3600,
        "5 s to {} days",
    ),
    "page of a list": ("functions/read_predictions/app.py", "PAGE_SIZE", 1, "{} predictions"),
    "entries that a page of a filtered list examines": (
        "layers/predictions/predictions/store/reads.py",
        "EXAMINED_PAGES",
        1,
        "{} times its size: 1000",
    ),
    "logs in a response": (
        "layers/predictions/predictions/views/prediction.py",
        "_LOGS_LIMIT_CHARACTERS",
        1024,
        "the last {} Ki ",
    ),
    "input or result in the table": (
        "layers/predictions/predictions/store/payloads.py",
        "PAYLOAD_LIMIT_BYTES",
        1024,
        "{} KiB",
    ),
    "one check of an input": ("layers/predictions/predictions/upstream/input_schema.py", "STEPS_LIMIT", 1, "{} steps"),
    "files of an output": ("layers/predictions/predictions/files/output_references.py", "FILES_LIMIT", 1, "{};"),
    "fields of a refusal by Replicate": (
        "layers/predictions/predictions/lifecycle/start.py",
        "REFUSAL_FIELDS_LIMIT",
        1,
        "the first {},",
    ),
    "an output file": (
        "layers/predictions/predictions/files/copier.py",
        "FILE_MAX_BYTES",
        2**30,
        "{} GiB, 600 s",
    ),
    "steps of a pipeline": ("layers/predictions/predictions/pipelines/definition.py", "STEPS_LIMIT", 1, "{}"),
    "elements of a `for_each`": ("layers/predictions/predictions/pipelines/definition.py", "ITEMS_LIMIT", 1, "{}"),
    "steps with `for_each`": ("layers/predictions/predictions/pipelines/definition.py", "FAN_OUTS_LIMIT", 1, "{}"),
    "a pipeline": ("layers/predictions/predictions/pipelines/manage.py", "LIFETIME_SECONDS", 86400, "{} days"),
    "one sweep": ("functions/sweep_predictions/app.py", "SWEEP_LIMIT", 1, "{} predictions"),
    "age of a webhook": ("layers/predictions/predictions/net/signatures.py", "TOLERANCE_SECONDS", 1, "{} s"),
    "one try of a webhook to a caller": (
        "layers/predictions/predictions/notifications/webhook_sender.py",
        "TOTAL_SECONDS",
        1,
        "{} s;",
    ),
}


@pytest.mark.parametrize("what", LIMITS)
def test_table_of_limits_gives_those_of_the_code(what: str) -> None:
    path, name, unit, text = LIMITS[what]
    (limit,) = [row[1] for row in rows(section("docs/limits.md", "Fixed limits")) if row[0] == what]
    assert limit.startswith(text.format(constant(path, name) // unit))


def test_table_of_limits_gives_the_wait_of_the_template() -> None:
    (limit,) = [row[1] for row in rows(section("docs/limits.md", "Fixed limits")) if row[0] == "`Prefer: wait`"]
    assert limit == f"`SyncWaitSeconds`, {PARAMETERS['SyncWaitSeconds']['Default']} s"


def test_table_of_limits_gives_the_throttling_of_the_template() -> None:
    settings, *_ = resources("AWS::Serverless::Api")["Api"]["Properties"]["MethodSettings"]
    rate, burst = PARAMETERS[settings["ThrottlingRateLimit"]["Ref"]]["Default"], settings["ThrottlingBurstLimit"]
    (limit,) = [row[1] for row in rows(section("docs/limits.md", "Fixed limits")) if row[0] == "requests to the API"]
    assert limit.startswith(f"{rate} a second, bursts of {burst}")
    public = PARAMETERS["PublicRequestsPerSecond"]["Default"]
    (limit,) = [
        row[1] for row in rows(section("docs/limits.md", "Fixed limits")) if row[0] == "requests to a public route"
    ]
    assert limit.startswith(f"{public} a second")


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wholes = [page.read_text() for page in PAGES]
    shown = "\n".join(text for whole in wholes for text in [*BLOCKS.findall(whole), *code(BLOCKS.sub("", whole))])
    used = set(re.findall(r"\bmake ([a-z]+)", shown))
    assert {"demo", "local", "test"} <= used
    assert used <= targets


def test_contributing_lists_every_make_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = {name.split()[1] for name in named("CONTRIBUTING.md", "Commands")}
    assert listed == targets


def test_pages_are_all_of_the_repository_and_the_readme_is_short() -> None:
    assert len(PAGES) > 40
    assert all(page.is_file() for page in PAGES)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Any) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCKS.sub("", page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(BLOCKS.sub("", target.read_text())), link
