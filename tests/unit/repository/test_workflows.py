"""The workflows of `.github`: they call make, with the least permissions, and nothing that can change under them."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.template import ROOT

FOLDER = ROOT / ".github/workflows"
FILES = sorted(FOLDER.glob("*.yml"))
# The commits of the tags, as the repositories of the actions have them.
PINNED = {
    "actions/checkout": ("3d3c42e5aac5ba805825da76410c181273ba90b1", "v7.0.1"),
    "actions/setup-python": ("5fda3b95a4ea91299a34e894583c3862153e4b97", "v7.0.0"),
    "actions/setup-node": ("820762786026740c76f36085b0efc47a31fe5020", "v7.0.0"),
    "actions/upload-pages-artifact": ("fc324d3547104276b827a68afc52ff2a11cc49c9", "v5.0.0"),
    "actions/deploy-pages": ("cd2ce8fcbc39b97be8ca5fce6e763baed58fa128", "v5.0.0"),
}
# The jobs that may do more than read the code.
MORE = {
    ("docs.yml", "deploy"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"contents": "write"},
}
TARGETS = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(name: str) -> dict[str, Any]:
    """A workflow; its `on`, which YAML 1.1 takes for a boolean, is under True."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for file in FILES:
        for name, job in load(file.name)["jobs"].items():
            yield file.name, name, job


def commands(job: dict[str, Any]) -> Iterator[str]:
    """The commands of a job, for each row of its matrix."""
    rows = job.get("strategy", {}).get("matrix", {}).get("target", [""])
    for step in job["steps"]:
        if "run" in step:
            yield from (step["run"].replace('"$TARGET"', row) for row in rows)


def test_workflows_are_those_of_tests_docs_and_releases() -> None:
    assert [file.name for file in FILES] == ["docs.yml", "release.yml", "test.yml"]
    assert set(load("test.yml")[True]) == {"push", "pull_request"}  # type: ignore[index]
    assert load("docs.yml")[True] == {"push": {"branches": ["main"]}}  # type: ignore[index]
    assert load("release.yml")[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+"]}}  # type: ignore[index]


def test_every_command_is_a_target_of_make() -> None:
    called = [(file, command) for file, _, job in jobs() for command in commands(job)]
    assert len(called) == 7
    for file, command in called:
        words = command.split()
        assert words[0] == "make", (file, command)
        assert set(words[1:]) <= TARGETS, (file, command)


def test_changes_are_checked_by_all_that_ci_runs() -> None:
    script = set(re.findall(r"^(?:exec )?make (\w+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    (job,) = load("test.yml")["jobs"].values()
    assert {command.removeprefix("make ") for command in commands(job)} == script
    assert job["strategy"]["fail-fast"] is False


def test_release_is_tested_before_it_is_published() -> None:
    release = load("release.yml")["jobs"]
    assert release["publish"]["needs"] == "test"
    assert [*commands(release["test"]), *commands(release["publish"])] == ["make test", "make publish"]
    (step,) = [step for step in release["publish"]["steps"] if "run" in step]
    assert step["env"] == {"TAG": "${{ github.ref_name }}", "GH_TOKEN": "${{ github.token }}"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_actions_are_pinned_by_commit_with_their_version_beside_it(file: Any) -> None:
    text = file.read_text()
    used = re.findall(r"uses: (\S+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", text, re.MULTILINE)
    assert len(used) == text.count("uses:")
    for name, commit, version in used:
        assert PINNED[name] == (commit, version)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_runs_of_one_kind_do_not_overlap(file: Any) -> None:
    assert load(file.name)["concurrency"].keys() == {"group", "cancel-in-progress"}


def test_job_may_only_read_the_code_unless_it_is_listed() -> None:
    for file, name, job in jobs():
        assert load(file)["permissions"] == {"contents": "read"}
        assert job.get("permissions") == MORE.get((file, name)), (file, name)
        assert 0 < job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_no_text_of_an_event_becomes_a_part_of_a_command() -> None:
    for file, _, job in jobs():
        assert "${{" not in " ".join(step.get("run", "") for step in job["steps"]), file
    assert "pull_request_target" not in "".join(file.read_text() for file in FILES)
