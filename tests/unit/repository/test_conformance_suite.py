"""The suite of clients: its registry, the page that it writes, and the lines of clients that docs/clients.md shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import suite
from tests.conformance.__main__ import complaints
from tests.conformance.suite import CLIENTS, HERE, OPERATIONS, Client, Told, column, operations, page, read_client
from tests.support.modules import load_module
from tests.support.template import ROOT

DOCS = (ROOT / "docs" / "clients.md").read_text()
GOOD = '# /// client\n# title = "A"\n# packages = ["a==1.0"]\n# ///\n'


def without_blanks(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_registry_has_every_file_of_its_folder() -> None:
    files = {path.stem for path in (HERE / "clients").iterdir() if path.is_file()}
    assert len(files) >= 10
    assert CLIENTS.keys() == files
    assert [name for name, client in CLIENTS.items() if client.official] == ["javascript", "python1", "python2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("print()\n", "has no header"),
        (GOOD.replace("a==1.0", "a>=1.0"), "'a>=1.0' must name one version"),
        (GOOD.replace("a==1.0", "a"), "'a' must name one version"),
    ],
)
def test_file_that_pins_nothing_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "new.py").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        suite.read_clients(tmp_path)


@pytest.mark.parametrize("name", ["new@latest", "new@^1.0.0", "new"])
def test_package_of_npm_that_floats_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new.mjs"
    path.write_text(GOOD.replace("# ", "// ").replace("a==1.0", name))
    with pytest.raises(ValueError, match="must name one version"):
        read_client(path)


def test_next_client_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text(GOOD)
    (client,) = suite.read_clients(tmp_path).values()
    assert (client.name, client.title, client.official, client.is_locked()) == ("new", "A, `a` 1.0", False, False)


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_client_is_locked_by_hash_and_from_no_certain_registry(client: Client) -> None:
    assert client.is_locked()
    text = client.lock.read_text()
    if client.is_python:
        entries = re.findall(r"^[\w.-]+==.*((?:\n +--hash=sha256:.*)*)", text, re.MULTILINE)
        assert all(entries)
        assert "://" not in text
    else:
        installed = [package for path, package in json.loads(text)["packages"].items() if path]
        assert all(package["integrity"].startswith("sha512-") for package in installed)
        assert not any("resolved" in package for package in installed)
    assert {path.stem for path in client.lock.parent.iterdir()} == CLIENTS.keys()


def test_other_version_than_the_locked_one_is_not_locked() -> None:
    for client in (CLIENTS["javascript"], CLIENTS["litellm"]):
        other = Client(client.path, "A", (client.packages[0] + "1", *client.packages[1:]), official=False)
        assert not other.is_locked()


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_page_of_clients_shows_the_lines_that_ran(client: Client) -> None:
    package, _, version = client.packages[0].rpartition("==" if client.is_python else "@")
    assert f"`{package}` " in DOCS
    assert version in DOCS
    assert [kind for kind, _ in client.shown].count("point") == 1
    for kind, lines in client.shown:
        if client.name == "mcp":
            continue
        assert kind == "key" or len([line for line in lines.splitlines() if line]) <= 3
        assert without_blanks(lines) in without_blanks(DOCS), f"docs/clients.md does not show:\n{lines}"


def test_configuration_of_the_mcp_server_has_the_variables_and_the_version_that_ran() -> None:
    client = CLIENTS["mcp"]
    (shown,) = re.findall(r"^```json\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    server = json.loads(shown)["mcpServers"]["replicate"]
    ((_, lines),) = client.shown
    assert list(server["env"]) == re.findall(r"REPLICATE_\w+", lines)
    assert client.packages[0] in server["args"]
    assert set(server["args"]) - {"-y", client.packages[0]} == {"--tools=dynamic"}
    assert '"--tools=dynamic"' in client.path.read_text()


def test_page_has_a_column_for_each_client_and_a_row_for_each_operation_that_one_has() -> None:
    told = {
        "javascript": {"run_file": Told(ok=True, detail=""), "stream": Told(ok=True, detail="from afar")},
        "python1": {"run_file": Told(ok=True, detail="–")},  # noqa: RUF001 - what the page shows
        "mcp": {"account_get": Told(ok=True, detail="")},
    }
    text = page(told)
    assert column(text, CLIENTS["javascript"]) == {OPERATIONS["run_file"]: "✓", OPERATIONS["stream"]: "from afar"}
    assert column(text, CLIENTS["python1"]) == {}
    assert column(text, CLIENTS["mcp"]) == {OPERATIONS["account_get"]: "✓"}
    with pytest.raises(KeyError, match="litellm"):
        column(text, CLIENTS["litellm"])


def test_growth_is_an_operation_only_where_reads_are_live(tmp_path: Path) -> None:
    live = operations(live=True).keys() - operations(live=False).keys()
    assert live == {"live_logs", "live_progress", "live_output"}
    template = tmp_path / "template.yaml"
    template.write_text("Parameters:\n  PollSeconds:\n    Type: Number\n")
    assert not suite.has_live_reads(template)
    (tmp_path / "live.yaml").write_text("Parameters:\n  LiveReadSeconds:\n    Type: Number\n")
    assert suite.has_live_reads(tmp_path / "live.yaml")


def test_run_is_whole_only_if_nothing_failed_is_missing_or_unknown() -> None:
    client = CLIENTS["python1"]
    whole = {flow: Told(ok=True, detail="") for flow in operations() if flow not in suite.NOT_OF_THE_OFFICIAL}
    assert complaints(client, whole) == []
    assert complaints(CLIENTS["mcp"], {"account_get": Told(ok=True, detail="")}) == []
    missing = {flow: each for flow, each in whole.items() if flow != "hardware_list"}
    assert complaints(client, missing) == ["python1 hardware_list: it has no such flow"]
    assert complaints(client, whole | {"run_text": Told(ok=False, detail="why")}) == ["python1 run_text: why"]
    assert complaints(client, whole | {"more": Told(ok=True, detail="")}) == [
        "python1 more: there is no such operation"
    ]


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What flows in Python share."""
    for name in ("API_URL", "ACCESS_TOKEN", "WEAK_TOKEN", "RECORD_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/v1")
    return load_module(HERE / "support" / "flows.py")


def test_output_that_comes_at_once_has_not_grown(flows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.01, 1.02, 5.0, 5.1, 5.2])
    monkeypatch.setattr(flows.time, "monotonic", lambda: next(clock))
    with pytest.raises(AssertionError, match="3 pieces came at 1 times"):
        flows.grew(["a", " fox", " runs"])
    with pytest.raises(AssertionError, match="3 pieces came at 1 times"):
        flows.grew(["a", " fox", " runs"])
    clock = iter([1.0, 1.5, 2.0])
    assert flows.grew(["a", " fox", " runs"]) == "a fox runs"


def test_logs_that_shrink_or_stay_have_not_grown(flows: Any) -> None:
    flows.growing([None, "a", "ab"])
    for seen in ([], ["a", "a", "ab"], ["abc", "ab", "a"]):
        with pytest.raises(AssertionError):
            flows.growing(seen)


def test_flow_that_raises_is_told_as_failed_and_a_live_one_is_left_out(
    flows: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise ValueError("why")

    monkeypatch.setattr(flows.sys, "argv", ["client.py"])
    flows.run({"run_text": lambda: None, "run_file": fails, "live_logs": lambda: None})
    text, file = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert text == {"flow": "run_text", "ok": True, "detail": ""}
    assert (file["flow"], file["ok"], "ValueError: why" in file["detail"]) == ("run_file", False, True)
    monkeypatch.setenv("LIVE", "1")
    flows.run({"live_logs": lambda: None})
    assert json.loads(capsys.readouterr().out)["flow"] == "live_logs"
