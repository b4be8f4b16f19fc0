"""The command `replicate-serverless`: operate a deployed stack.

    replicate-serverless tokens create --stack NAME --owner alice
    replicate-serverless doctor --stack NAME
    replicate-serverless show ID --stack NAME
    replicate-serverless dead-letters list requests --stack NAME
    replicate-serverless pause --stack NAME --reason "The model is being changed."

Results go to stdout and everything else to stderr, so that `TOKEN=$(replicate-serverless tokens create …)` works.
Exit codes: 0 if the command succeeded; 2 if it did not, and stderr says why and what to do; 1 if `doctor` has found
a fault.
"""

import sys
from collections.abc import Sequence

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

from predictions.cli import (
    admission,
    budgets,
    dead_letters,
    doctor,
    inspect,
    maintenance,
    prices,
    tokens,
    url_keys,
    usage,
    webhooks,
)
from predictions.cli.stack import PROGRAM, group
from predictions.errors import PredictionsError

app = group("Operate a deployed replicate-serverless stack.")
app.add_typer(doctor.app)  # without a name: its commands are top-level ones
app.add_typer(inspect.app)
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(maintenance.outputs, name="outputs")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(maintenance.secrets, name="secrets")
app.add_typer(tokens.app, name="tokens")
app.add_typer(admission.limits, name="limits")
app.add_typer(admission.app)
app.add_typer(prices.app, name="prices")
app.add_typer(budgets.app, name="budgets")
app.add_typer(usage.app)
app.add_typer(url_keys.app, name="urls")
app.add_typer(maintenance.app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        app(argv, prog_name=PROGRAM)
    except SystemExit as end:  # how typer ends every command, help and usage errors
        return int(end.code or 0)
    except NoCredentialsError:
        return _fail("no AWS credentials found. Log in, or name a profile with --profile.")
    except NoRegionError:
        return _fail("no AWS region given. Use --region, or set AWS_REGION.")
    except (PredictionsError, BotoCoreError, ClientError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
