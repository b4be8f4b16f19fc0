"""The running local stack of a folder: its lock, the description in ``stack.json``, and what a shell needs to use it.

`reserved` lets one process at a time keep a stack in a folder. `running_stack` finds that stack, and `exports` is what
``make env`` prints for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from local.cloud import CHECKOUT, CREDENTIALS, STACK_NAME, LocalCloudError, Stack, local_directory

COMMAND = "replicate-serverless"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class NotRunning(Exception):
    """No local stack is running; the message gives the remedy."""


@contextlib.contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Hold a folder for the stack of this process, while the context lasts.

    The kernel releases the lock when this process ends, however it ends: a file that a killed process left behind
    refuses nobody, and a process id that was given out again is not mistaken for a stack.

    Raises:
        LocalCloudError: Another process holds it, or the folder cannot be locked.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "stack.lock").open("a+")
    except OSError as error:
        raise LocalCloudError(f"{directory} cannot be used ({error}). Set LOCAL_DIR to another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown: it has just begun"
            raise LocalCloudError(
                f"A local stack is running in {directory} already (process {holder}). Use that one, stop it, or run "
                "a second one beside it, in a folder of its own: make local LOCAL_DIR=/tmp/second"
            ) from None
        except OSError as error:
            raise LocalCloudError(
                f"{directory} cannot be locked ({error}). Set LOCAL_DIR to a folder of a local disk."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        (directory / "stack.json").unlink(missing_ok=True)  # of a process that was killed
        yield


def running_stack() -> Stack:
    """Find the running local stack by its ``stack.json``.

    Raises:
        NotRunning: No local stack is running.
    """
    path = local_directory() / "stack.json"
    hint = "Run `make local` and leave it running (with the same LOCAL_DIR, if any)"
    try:
        stack = Stack(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise NotRunning(f"No local stack is running. {hint}.") from None
    except (ValueError, TypeError) as error:
        raise NotRunning(f"{path} was not written by `make local` ({error}). {hint}.") from None
    try:
        httpx.get(f"{stack.endpoint_url}/_ministack/health", timeout=5, trust_env=False).raise_for_status()
    except httpx.HTTPError:
        raise NotRunning(f"The local stack in {path} does not respond. {hint}.") from None
    return stack


def exports(stack: Stack, environment: Mapping[str, str]) -> str:
    """Return the shell commands after which the commands of the pages address a stack.

    Args:
        stack: The running stack.
        environment: The variables of the shell: with a proxy among them, this machine is exempted from it.
    """
    variables = {
        "API": stack.api_url,
        "TOKEN": stack.access_token,
        "OWNER": stack.owner,
        "STACK": STACK_NAME,
        "QUEUE": stack.queue_url,
        "INPUTS_BUCKET": stack.inputs_bucket,
        "OUTPUTS_BUCKET": stack.outputs_bucket,
        "FUNCTION": stack.run_prediction_function_name,
        "FUNCTION_ARN": stack.run_prediction_function_arn,
        "REPLICATE": stack.replicate_api_url,
        "AWS_ENDPOINT_URL": stack.endpoint_url,
        "AWS_REGION": stack.region,
        "AWS_DEFAULT_REGION": stack.region,
        **CREDENTIALS,
    }
    if any(name.lower() in PROXIES and value for name, value in environment.items()):
        for name in ("NO_PROXY", "no_proxy"):
            variables[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1,localhost"]))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    # Those of another account would be used beside the local ones.
    lines.append("unset AWS_PROFILE AWS_DEFAULT_PROFILE AWS_SESSION_TOKEN")
    # Version 1 of the AWS CLI ignores AWS_ENDPOINT_URL for SQS.
    lines.append('aws() { command aws ${AWS_ENDPOINT_URL:+--endpoint-url="$AWS_ENDPOINT_URL"} "$@"; }')
    lines.append(f'export PATH={shlex.quote(str(_commands()))}:"$PATH"')
    return "\n".join(lines)


def _commands() -> Path:
    """Return a folder with the operator's command alone: the environment's own would replace the shell's Python."""
    folder = CHECKOUT / ".local" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / COMMAND).symlink_to(CHECKOUT / ".venv" / "bin" / COMMAND)
    return folder
