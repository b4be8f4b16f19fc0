"""The commands of the pages, pasted as a new user does, into a shell in which `make env` was evaluated."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from local.cloud import CHECKOUT, LocalCloud
from local.replicate.process import LocalReplicate
from tests.support.template import ROOT

BLOCKS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
# For AWS alone, or they start a stack, or change what other tests need. Those of the runbook are in test_commands.
ELSEWHERE = re.compile(r"^sam |make local|webhook_lost|redrive", re.MULTILINE)
PAGES = {  # in this order, with the number of blocks that run here: the first one sets what the others use
    "docs/getting-started.md": 4,
    "README.md": 1,
    "docs/api.md": 3,
    "docs/files.md": 2,
    "docs/recipes.md": 2,
    "docs/batches.md": 2,
    "docs/pipelines.md": 1,
    "docs/queue.md": 1,
    "docs/direct-invocation.md": 3,
}
# README, getting started, recipe, batch, dropped manifest, pipeline, queue, jobs. A training is in another list.
STARTED = 1 + 1 + 1 + 2 + 2 + 4 + 1 + 2
REFUSED = ["422"]  # the invalid input of the page of the API

# The shell ends at the first command that fails, and at a variable that is not set; each response's code is shown.
STRICT = """
set -euo pipefail
curl() { command curl -w '%{stderr}<%{http_code}>\\n' "$@"; }
"""
# What a reader sees before going on.
SUCCEEDED = """
until curl -s "$API/predictions/$ID" -H "Authorization: Bearer $TOKEN" |
  grep -q '"status":"succeeded"'; do sleep 0.3; done
"""


def test_commands_of_the_pages_work_as_they_are_pasted(
    cloud: LocalCloud, replicate: LocalReplicate, wait_until: Callable[..., Any], tmp_path: Path
) -> None:
    if not shutil.which("aws"):
        pytest.skip("the AWS CLI is not installed")
    pasted = [STRICT]
    for page, count in PAGES.items():
        blocks = [text for text in BLOCKS.findall((ROOT / page).read_text()) if not ELSEWHERE.search(text)]
        assert len(blocks) == count, page
        for text in blocks:
            pasted += [text, SUCCEEDED if "ID=$(" in text else "", f"echo; echo '== {page}' >&2\n"]
    # As in the checkout, with what the commands write elsewhere.
    for each in CHECKOUT.iterdir():
        (tmp_path / each.name).symlink_to(each)
    headers = {"Authorization": f"Bearer {cloud.stack.access_token}"}
    with (
        httpx.Client(base_url=cloud.stack.api_url, headers=headers, trust_env=False, timeout=30) as api,
        cloud.stack.file(tmp_path / "stack" / "stack.json"),
    ):
        before = shown(api)
        try:
            done = subprocess.run(  # noqa: S603  # the project's own pages
                ["/bin/bash", "-c", "".join(pasted)],
                cwd=tmp_path,
                # A make within another one says which folder it enters.
                env={k: v for k, v in os.environ.items() if "MAKE" not in k} | {"LOCAL_DIR": str(tmp_path / "stack")},
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            codes = re.findall(r"^<(\d+)>$", done.stderr, re.MULTILINE)
            assert len(codes) > 15
            assert [code for code in codes if not code.startswith("2")] == REFUSED, done.stdout
            wait_until(lambda: len(settled(api, before)) == STARTED, 60, f"{STARTED} predictions that have completed")
            assert set(settled(api, before).values()) == {"succeeded"}
        finally:
            for recipe in api.get("/recipes").json()["results"]:
                api.delete(f"/recipes/{recipe['name']}")


def shown(api: httpx.Client) -> dict[str, str]:
    """The status of each prediction that the token shows, by id."""
    return {each["id"]: each["status"] for each in api.get("/predictions").raise_for_status().json()["results"]}


def settled(api: httpx.Client, before: dict[str, str]) -> dict[str, str]:
    """Those started since that have completed."""
    started = {id_: status for id_, status in shown(api).items() if id_ not in before}
    return {id_: status for id_, status in started.items() if status in ("succeeded", "failed", "canceled")}
