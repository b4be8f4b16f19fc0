"""Commands for the API's access tokens."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from predictions.api.access_tokens import AccessTokens, Scope
from predictions.cli.stack import JsonList, Stack, command, group, print_table

app = group("Create, list and revoke access tokens of the API.")


@command(app, "create", example="tokens create --owner alice --name laptop --stack NAME")
def create_token(
    stack: Stack,
    owner: Annotated[str, typer.Option(help="Owner whose predictions it can see: 1 to 32 of a-z, 0-9 and '-'.")],
    scopes: Annotated[
        str, typer.Option(help=f"Scopes, separated by commas: any of {', '.join(Scope)}.")
    ] = f"{Scope.PREDICT},{Scope.READ}",
    name: Annotated[str, typer.Option(help="A label, such as the machine that uses the token.")] = "",
) -> None:
    """Create a token and print it to stdout.

    The token is shown only once.
    """
    token, access = _access_tokens(stack).create(owner, [scope.strip() for scope in scopes.split(",")], name)
    # Only its hash is stored, so the token cannot be shown again: nothing may come between the two.
    print(token, flush=True)
    print(f"Token {access.id} for {access.owner}: {', '.join(access.scopes)}. It is shown only once.", file=sys.stderr)


@command(app, "list", example="tokens list --stack NAME")
def list_tokens(stack: Stack, as_json: JsonList = False) -> None:
    """List all tokens, oldest first.

    Shows the last characters of each token, never the token.
    """
    tokens = _access_tokens(stack).list()
    if as_json:
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


@command(app, "revoke", example="tokens revoke abcdef123456 --stack NAME")
def revoke_token(
    stack: Stack,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as shown by `tokens list`.")],
) -> None:
    """Revoke a token; the API rejects it within 60 seconds."""
    access = _access_tokens(stack).revoke(token_id)
    print(f"Token {access.id} of {access.owner} is revoked; the API rejects it within 60 seconds.", file=sys.stderr)


def _access_tokens(stack: Stack) -> AccessTokens:
    return AccessTokens(stack.output("TableName"), stack.client("dynamodb"))
