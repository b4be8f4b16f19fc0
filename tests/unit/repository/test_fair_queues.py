"""Every message to a queue in which owners wait for one another names its owner's group."""

import ast
import json

from tests.support.template import ROOT

LAYER = ROOT / "layers" / "predictions" / "predictions"
# In neither do owners wait for one another: commands read dead letters, and retries of stream records come in time.
WITHOUT = {"aws/dead_letter_queue.py", "notifications/stream_retries.py"}


def test_every_send_of_the_library_names_a_group() -> None:
    sends = {}
    for path in LAYER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "send_message":
                named = {keyword.arg for keyword in node.keywords}
                # `**group` in webhook_queue is the group, if the owner is known.
                sends[str(path.relative_to(LAYER))] = bool(named & {"MessageGroupId", None})
    assert sends.keys() > WITHOUT
    assert {path for path, grouped in sends.items() if not grouped} == WITHOUT


def test_lines_of_batches_are_in_the_group_of_their_owner() -> None:
    machine = json.loads((ROOT / "statemachine" / "run_batch.asl.json").read_text())
    lines = machine["States"]["RunLines"]
    assert lines["ItemSelector"]["owner.$"] == "$.owner"
    sent = lines["ItemProcessor"]["States"]["RunLine"]
    assert sent["Resource"].endswith(":sqs:sendMessage.waitForTaskToken")
    assert sent["Parameters"]["MessageGroupId.$"] == "$.owner"
