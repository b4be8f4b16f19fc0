"""Access tokens of the API."""

import argparse
import json
import sys
from dataclasses import asdict

from predictions.access import AccessTokens
from predictions.cli.stack import Stack, print_table


def create_token(stack: Stack, arguments: argparse.Namespace) -> None:
    """Makes a token, which goes to stdout."""
    scopes = [scope.strip() for scope in arguments.scopes.split(",")]
    token, access = _access_tokens(stack).create(arguments.owner, scopes, arguments.name)
    # Stored, the token cannot be shown again: nothing may come between the two.
    print(token, flush=True)
    print(
        f"Token {access.id} for {access.owner}: {', '.join(access.scopes)}. It is shown only this once.",
        file=sys.stderr,
    )


def list_tokens(stack: Stack, arguments: argparse.Namespace) -> None:
    """All tokens, without the tokens themselves."""
    tokens = _access_tokens(stack).list()
    if arguments.json:
        print(json.dumps([asdict(token) for token in tokens], indent=2))
        return
    rows = [
        (
            token.id,
            token.owner,
            ",".join(token.scopes),
            token.token_hint,
            token.created_at[:19] + "Z",
            token.name,
        )
        for token in tokens
    ]
    print_table(("ID", "OWNER", "SCOPES", "ENDS IN", "CREATED", "NAME"), rows)


def revoke_token(stack: Stack, arguments: argparse.Namespace) -> None:
    """Ends a token."""
    access = _access_tokens(stack).revoke(arguments.id)
    print(
        f"Token {access.id} of {access.owner} is revoked; the API refuses it within 60 seconds.",
        file=sys.stderr,
    )


def _access_tokens(stack: Stack) -> AccessTokens:
    return AccessTokens(stack.output("TableName"), stack.client("dynamodb"))
