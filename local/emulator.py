"""Start the MiniStack emulator with what it lacks for this project; runs on the emulator's own Python.

The emulator reports every error of a function as `Runtime.HandlerError`. AWS reports the class of the exception, and a
state machine catches it by that name. The class is in the traceback that the emulator keeps for the function's log.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from ministack.app import main
from ministack.services import lambda_svc

# The last line of a traceback: `package.module.ClassName: message`.
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+)(?::|$)", re.MULTILINE | re.ASCII)


def named(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Makes the emulator's runner of functions tell the name of the exception that a function raised."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        result = execute(*args, **options)
        body = result.get("body")
        if isinstance(body, dict) and body.get("errorType") == "Runtime.HandlerError":
            message = str(body.get("errorMessage", ""))
            last = str(result.get("log", "")).rstrip().removesuffix(message).rstrip().rpartition("\n")[2]
            if raised := RAISED.match(last):
                body["errorType"] = raised[1]
        return result

    return run


lambda_svc._execute_function_warm = named(lambda_svc._execute_function_warm)
main()
