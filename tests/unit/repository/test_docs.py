"""The pages: their examples parse and call real routes, the site has all of them, and the picture is a real one."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from PIL import Image

from local import docs, picture, site_links
from local.demo import DROPPED, PICTURE, conclude
from local.terminal import Terminal
from tests.support.library import modules
from tests.support.pages import BLOCKS, PAGES, code, rows, section
from tests.support.template import ROOT, _Loader, load_template, resources

FENCES = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(
        found[1], found[2], id=f"{page.relative_to(ROOT)}-{page.read_text()[: found.start()].count(chr(10)) + 1}"
    )
    for page in PAGES
    for found in FENCES.finditer(page.read_text())
]
SITE = yaml.load(
    re.sub(r"!!?(ENV|python)\S*", "", (ROOT / "mkdocs.yml").read_text()).replace("[REPOSITORY_URL,", "["),
    yaml.SafeLoader,
)


# -- examples ------------------------------------------------------------------------------------------------------


def shell_of(language: str, text: str) -> str:
    """The commands of a block: all of it, or of a terminal's session the lines after a prompt."""
    return text if language == "bash" else "\n".join(re.findall(r"^\$ (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize(("language", "text"), EXAMPLES)
def test_example_of_a_page_parses(language: str, text: str) -> None:
    match language:
        case "bash" | "console":
            # Placeholders such as <this repository> are redirections to a shell.
            commands = re.sub(r"<[a-z ]+>", "NAME", shell_of(language, text))
            bash = shutil.which("bash")
            assert bash
            done = subprocess.run([bash, "-n"], input=commands, capture_output=True, text=True)  # noqa: S603  # reads only
            assert commands
            assert (done.returncode, done.stderr) == (0, "")
        case "python":
            ast.parse(text)
        case "json":
            json.loads(text if text.startswith("{") else "{" + text + "}")
        case "yaml":
            assert yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
        case "js":
            if node := shutil.which("node"):
                script = f"(async () => {{{text}}})();"
                command = [node, "--check", "-"]
                checked = subprocess.run(command, input=script, capture_output=True, text=True)  # noqa: S603  # likewise
                assert (checked.returncode, checked.stderr) == (0, "")
        case _:
            assert language in ("text", "mermaid")


def routes() -> set[tuple[str, str]]:
    """The routes of the template, with `*` for each variable part."""
    return {
        (event["Properties"]["Method"].upper(), re.sub(r"\{[^}]+\}", "*", event["Properties"]["Path"]))
        for function in resources("AWS::Serverless::Function").values()
        for event in function["Properties"].get("Events", {}).values()
        if event["Type"] == "Api"
    }


def test_every_curl_of_a_page_calls_a_route() -> None:
    known = routes()
    calls = set()
    for page in PAGES:
        for language, text in FENCES.findall(page.read_text()):
            if language != "bash":
                continue
            for command in re.findall(r"^curl .*?(?<!\\)$", text, re.MULTILINE | re.DOTALL):
                if not (path := re.search(r'"\$API(/[^"?]*)"', command)):
                    continue
                method = re.search(r"-X (\w+)", command)
                sends = re.search(r" -[dF] ", command)
                calls.add((method[1] if method else "POST" if sends else "GET", path[1]))
    assert len(calls) > 8
    for verb, called in calls:
        assert any(verb == allowed and re.fullmatch(route.replace("*", "[^/]+"), called) for allowed, route in known), (
            called
        )


def test_lists_of_the_pages_begin_after_an_empty_line() -> None:
    """Python-Markdown, which builds the site, takes others for text; GitHub does not."""
    for page in PAGES:
        text = BLOCKS.sub("", page.read_text())
        broken = re.findall(r"^(?![-*|#>] |\d+\. |  )\S.*\n(?:[-*] |1\. ).*$", text, re.MULTILINE)
        assert not broken, (page.name, broken)


def test_rows_of_each_table_have_the_cells_of_its_heading() -> None:
    seen = 0
    for page in PAGES:
        cells = 0
        for line in BLOCKS.sub("", page.read_text()).splitlines():
            bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert bars == (cells or bars) or not bars, (page.name, line)
            cells, seen = bars, seen + bool(bars)
    assert seen > 400


# -- what the pages say --------------------------------------------------------------------------------------------


def test_table_of_items_has_every_partition_key_of_the_code() -> None:
    sources = [source.read_text() for source in modules().values()]
    assert len(sources) > 50
    whole = "".join(sources)
    table = rows(section("docs/architecture.md", "The table"))
    listed = {re.split("[#{]", name)[0] for row in table for name in code(row[0])}
    assert len(listed) > 12
    # Keys are written as `Key(f"batch#{id}", …)`, some with a name for what they begin with.
    names = dict(re.findall(r"^([A-Z]+) = \"(\w+#)\"$", whole, re.MULTILINE))
    keys = re.findall(r"\bKey\(\s*f?\"(?:\{([A-Z]+)\}|(\w+)[#\"])", whole)
    written = {names[name].removesuffix("#") if name else word for name, word in keys}
    assert len(written) > 10
    assert written <= listed
    for name in listed:
        assert re.search(rf"""["`]{name}(#|["`])""", whole), name


COUNTED = {
    "functions": "AWS::Serverless::Function",
    "layers": "AWS::Serverless::LayerVersion",
    "state machines": "AWS::Serverless::StateMachine",
    "buckets": "AWS::S3::Bucket",
    "queues": "AWS::SQS::Queue",
    "secrets": "AWS::SecretsManager::Secret",
    "alarms": "AWS::CloudWatch::Alarm",
}


@pytest.mark.parametrize("kind", COUNTED)
def test_page_of_deployment_counts_the_resources_of_the_template(kind: str) -> None:
    (count,) = re.findall(rf"(\d+) {kind}", section("docs/deploy.md", "Resources"))
    assert int(count) == len(resources(COUNTED[kind]))


def test_cost_of_alarms_is_that_of_the_template() -> None:
    ((alarms, metrics),) = re.findall(r"(\d+) alarms on (\d+) metrics", section("docs/cost.md", "Per month"))
    found = [alarm["Properties"] for alarm in resources("AWS::CloudWatch::Alarm").values()]
    assert int(alarms) == len(found)
    # One with an expression is billed for each metric in it.
    assert int(metrics) == sum(
        sum("MetricStat" in each for each in alarm.get("Metrics", [{"MetricStat": {}}])) for alarm in found
    )


TIMES = "\N{MULTIPLICATION SIGN}"
FIGURE = r"[\d,]+(?:\.\d+)?"


def figure(text: str) -> float:
    return float(text.replace(",", ""))


def test_sum_of_a_prediction_is_that_of_its_rows_and_each_row_is_its_product() -> None:
    *parts, (_, _, _, together) = rows(section("docs/cost.md", "Per prediction"))
    assert len(parts) > 8
    sum_ = 0.0
    for item, _, price, product in parts:
        found = re.fullmatch(rf"({FIGURE}) {TIMES} ({FIGURE}) = \$({FIGURE})", product)
        listed = re.fullmatch(rf"\$({FIGURE}) per (1,000|million|\w+(?:-\w+)?)", price)
        assert found, item
        assert listed, item
        number, each, cost = map(figure, found.groups())
        assert each == pytest.approx(figure(listed[1]) / {"1,000": 1e3, "million": 1e6}.get(listed[2], 1)), item
        assert cost == pytest.approx(number * each, abs=0.00005), item
        sum_ += cost
    assert together == f"**${sum_:.2f}**"


def test_sum_of_a_month_is_that_of_its_rows_and_each_row_is_its_product() -> None:
    page = section("docs/cost.md", "Per month")
    costs = {item: figure(cost.removeprefix("$")) for item, cost in rows(page)}
    assert len(costs) > 4
    products = {item: re.findall(rf"({FIGURE}) (?:\S+ )?{TIMES} \$({FIGURE})( per million)?", item) for item in costs}
    assert sum(map(len, products.values())) == 4
    for item, found in products.items():
        known = sum(figure(number) * figure(each) / (1e6 if million else 1) for number, each, million in found)
        # Of the secrets, the reads come on top.
        assert known == pytest.approx(costs[item], abs=0.1 if "their reads" in item else 0.005) or not found, item
    sum_ = sum(costs.values())
    (most,) = re.findall(r"at most about \$(\d+)", page)
    assert int(most) == round(sum_)
    (idle,) = re.findall(r"An idle stack sends one metric .* without the dashboard, costs about \$(\d+) a month", page)
    ((own, metric),) = [(costs[item], figure(found[0][1])) for item, found in products.items() if "own metrics" in item]
    (dashboard,) = [cost for item, cost in costs.items() if "dashboard" in item]
    assert int(idle) == round(sum_ - own + metric - dashboard)


def test_pages_give_the_sums_of_the_page_of_costs() -> None:
    costs = rows(section("docs/cost.md", "Per prediction"))
    (sum_,) = [row[3].strip("*") for row in costs if row[0] == "**together**"]
    page = section("docs/cost.md", "Per month")
    (month,) = re.findall(r"at most about (\$\d+)", page)
    (idle,) = re.findall(r"costs about (\$\d+) a month", page)
    readme = section("README.md", "Cost")
    assert f"About {sum_} per 1,000" in readme
    assert f"{idle} (idle) to {month} a month" in readme
    assert f"About {sum_} per 1,000 predictions, and at most about {month} a month" in section("docs/cost.md", "Cost")
    (states,) = [row[3] for row in costs if "step-functions" in row[0]]
    of_states = f"${figure(states.split('$')[1]):.3f}"
    assert f"{of_states} per 1,000" in (ROOT / "docs/decisions/step-functions.md").read_text()
    assert f"no state machine: {of_states} less" in section("docs/cost.md", "Variations")
    (requests,) = [row[2] for row in costs if "api-gateway" in row[0]]
    assert f"{requests} requests" in (ROOT / "docs/decisions/rest-api.md").read_text()


def test_waiting_in_a_function_costs_its_time() -> None:
    (each,) = [
        figure(row[2].split()[0][1:])
        for row in rows(section("docs/cost.md", "Per prediction"))
        if row[0].endswith(", time")
    ]
    waits = re.findall(rf"({FIGURE}) GB-s: \$({FIGURE}) more", section("docs/cost.md", "Variations"))
    assert len(waits) == 2
    for gb_seconds, cost in waits:
        assert figure(cost) == round(figure(gb_seconds) * 1000 * each, 2)


def test_steps_that_the_readme_names_are_there() -> None:
    names = set(code((ROOT / "README.md").read_text()))
    machine = (ROOT / "statemachine/track_prediction.asl.json").read_text()
    states = set(re.findall(r'^    "(\w+)": \{$', machine, re.MULTILINE))  # no JSON: SAM puts numbers into it
    assert {"PollPrediction", "CopyOutputs"} <= names & states
    assert "start_prediction" in names
    assert (ROOT / "functions" / "start_prediction").is_dir()
    assert "TrackPredictionStateMachine" in load_template()["Resources"]


# -- the site ------------------------------------------------------------------------------------------------------


def leaves(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [page for child in children for page in leaves(child)]


def pages_of_docs() -> list[str]:
    return [str(page.relative_to(ROOT / "docs")) for page in sorted((ROOT / "docs").rglob("*.md"))]


def test_navigation_of_the_site_has_every_page_once() -> None:
    assert sorted(leaves(SITE["nav"])) == sorted(pages_of_docs())
    assert SITE["strict"] is True
    assert docs.BUILD == ("build", "--strict")
    assert set(SITE["validation"].values()) == {"warn"}
    assert SITE["plugins"] == ["search"]


@pytest.mark.parametrize("index", ["README.md", "docs/README.md", "llms.txt"])
def test_index_links_to_every_page(index: str) -> None:
    links = {
        link.partition("#")[0].removeprefix("docs/")
        for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / index).read_text())
    }
    indexed = {page for page in pages_of_docs() if "/" not in page or page.endswith("/README.md")} - {"README.md"}
    assert indexed <= links


def test_index_of_decisions_has_each_of_them_with_its_parts() -> None:
    records = [page for page in pages_of_docs() if page.startswith("decisions/") and not page.endswith("README.md")]
    assert len(records) >= 12
    links = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/decisions/README.md").read_text())
    assert sorted(f"decisions/{link}" for link in links) == sorted(records)
    for record in records:
        headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / record).read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], record


REPOSITORY = "https://git.example/team/stack"


@pytest.mark.parametrize(
    ("link", "site"),
    [
        ("../template.yaml", f"{REPOSITORY}/blob/main/template.yaml"),
        ("../tests/stack", f"{REPOSITORY}/tree/main/tests/stack"),
        ("../CONTRIBUTING.md#tests", f"{REPOSITORY}/blob/main/CONTRIBUTING.md#tests"),
        ("api.md#routes", "api.md#routes"),
        ("samples/caller.asl.json", "samples/caller.asl.json"),
        ("#routes", "#routes"),
        ("https://replicate.com", "https://replicate.com"),
        ("../no-such-file", "../no-such-file"),
        ("../../elsewhere", "../../elsewhere"),
    ],
)
def test_link_that_leaves_the_pages_leads_into_the_repository(link: str, site: str) -> None:
    folder = ROOT / "docs"
    assert site_links.linked(f"a [link]({link}).", folder, folder, REPOSITORY + "/") == f"a [link]({site})."


def test_code_blocks_of_the_site_stay_as_they_are() -> None:
    text = "```text\n[x](../template.yaml)\n```\n"
    assert site_links.linked(text, ROOT / "docs", ROOT / "docs", REPOSITORY) == text


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://git.example/team/stack.git", REPOSITORY),
        ("https://name:secret@git.example/team/stack", REPOSITORY),
        ("git@git.example:team/stack.git", REPOSITORY),
        ("ssh://git@git.example/team/stack.git", REPOSITORY),
        ("/srv/stack.git", ""),
        ("", ""),
    ],
)
def test_repository_of_the_site_is_that_of_the_remote(remote: str, url: str) -> None:
    assert docs.repository_url(remote) == url


def test_site_that_cannot_be_built_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "docs.txt"
    requirements.write_text("no-such-package==1 --hash=sha256:00\n")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setattr(docs, "REQUIREMENTS", requirements)
    monkeypatch.setattr(docs, "ENVIRONMENT", tmp_path / "docs")
    assert docs.main() == 1
    assert not (tmp_path / "docs" / "finished").exists()


# -- the picture ---------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def test_picture_of_the_readme_is_the_demonstration_and_small() -> None:
    assert "](docs/demo.svg)" in (ROOT / "README.md").read_text()
    file = ROOT / "docs" / "demo.svg"
    assert file.stat().st_size < 300_000
    svg = ET.fromstring(file.read_text())  # noqa: S314  # ours
    lines = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
    shown = "\n".join(lines)
    assert {PICTURE.title, DROPPED.title, "✓ all lines were checked"} <= set(lines)
    assert re.search(r"status +succeeded", shown)
    assert re.search(r"copied +[\d,]+ bytes of image/png", shown)
    assert re.search(r"sha256 +[0-9a-f]{64}", shown)
    images = [image.get("href", "") for image in svg.iter(f"{SVG}image")]
    assert len(images) == 2
    assert all(image.startswith("data:image/jpeg;base64,") for image in images)


def test_picture_has_the_lines_of_the_terminal_and_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    written = io.BytesIO()
    Image.new("RGBA", (60, 40), "red").save(written, "PNG")
    recorder = picture.Recorder(sys.stdout)
    terminal = Terminal(recorder, colours=True)
    for title in (PICTURE.title, "One that fails", DROPPED.title):
        terminal.title(title)
        terminal.event("request", "POST <a & b>", 1.0)
        terminal.detail("key", "k" * 120)
        terminal.write()
        terminal.figure("item writes", "8", f"of {title}")
    terminal.write()
    terminal.succeed("done")
    svg = picture.draw_demo(recorder.parts, [written.getvalue(), written.getvalue()])
    lines = ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314  # ours
    assert "One that fails" not in lines
    assert sum("POST <a & b>" in line for line in lines) == 2
    assert any(line.endswith(f"of {PICTURE.title}") for line in lines)
    assert not any(line.endswith(f"of {DROPPED.title}") for line in lines)
    assert max(map(len, lines)) == picture.LINE_CHARACTERS
    assert lines[-1] == "✓ done"
    assert "\033" not in svg + capsys.readouterr().out


def test_picture_without_figures_shows_none_and_no_link_to_a_file_of_this_machine(tmp_path: Path) -> None:
    written = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(written, "PNG")
    recorder = picture.Recorder(io.StringIO())
    terminal = Terminal(recorder, colours=True)
    for title in (PICTURE.title, "One that fails", DROPPED.title):
        terminal.title(title)
        terminal.event("request", f"of {title}", 1.0)
    terminal.write()
    terminal.step("stopping")
    conclude(terminal, tmp_path / "a picture.png")
    *_, last = recorder.getvalue().splitlines()
    assert last.strip() == f"file://{tmp_path}/a%20picture.png"
    svg = picture.draw_demo(recorder.parts, [written.getvalue(), written.getvalue()])
    lines = ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314  # ours
    assert "One that fails" not in svg
    assert lines[-1] == "✓ all lines were checked"
    assert "file://" not in svg
