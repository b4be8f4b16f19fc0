"""API Gateway's authorizer: an access token becomes its owner and scopes.

It stands before every cold call, so it imports nothing but the table's client; its event is three strings.
"""

from typing import Any

from predictions.admission.quotas import OwnersLimits
from predictions.api.access_tokens import AccessTokens, parse_authorization

access_tokens = AccessTokens.from_env()
owners_limits = OwnersLimits.from_env()


def handler(event: dict[str, str], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Allow the whole stage to the token's owner; each route checks the scopes.

    Args:
        event: `{"type": "TOKEN", "authorizationToken": "Bearer …", "methodArn":
            "arn:aws:execute-api:{region}:{account}:{api}/{stage}/{method}/{path}"}`
        context: Not used.

    Returns:
        `{"principalId": owner, "policyDocument": …, "context": {"owner", "scopes", "token_id"}}`, the scopes
        separated by spaces; and `in_flight_limit`, `per_day_limit`, `open_batches_limit`, `open_pipelines_limit`,
        and the same of `budget_day`, `budget_month` and `budget_unknown`, where its owner has such a limit.

    Raises:
        Exception: `Unauthorized`, for which API Gateway answers 401. Any other error, as when the table
            cannot be read, becomes a 500.
            https://docs.aws.amazon.com/apigateway/latest/developerguide/apigateway-use-lambda-authorizer.html
    """
    token = parse_authorization(event.get("authorizationToken"))
    access = access_tokens.find(token) if token else None
    if access is None:
        raise Exception("Unauthorized")
    # The answer is cached for the token, not the route: a policy of this route alone would refuse the next.
    stage_arn = "/".join(event["methodArn"].split("/")[:2])
    return {
        "principalId": access.owner,
        "policyDocument": {
            "Version": "2012-10-17",
            "Statement": [{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": f"{stage_arn}/*"}],
        },
        "context": {
            "owner": access.owner,
            "scopes": " ".join(access.scopes),
            "token_id": access.id,
            **owners_limits.limits_of(access.owner).context(),
        },
    }
