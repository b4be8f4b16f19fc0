"""Secret route of the API: the secret by which the stack signs an owner's webhooks."""

from predictions.api.app import answer_with, json_response, owner_with, resolver
from predictions.api.routing import Response
from predictions.notifications.signing_secrets import OwnerSecrets

app = resolver()
secrets = OwnerSecrets.from_env()


@app.get("/webhooks/default/secret")
def secret() -> Response:
    """`GET /webhooks/default/secret`: `{"key": "whsec_…"}`, the owner's current one."""
    # `read` would let a token that may only look sign webhooks, on which receivers act.
    owner = owner_with(app, "predict")
    # A secret does not belong into a cache between here and there.
    return json_response(200, {"key": secrets.current_secret(owner)}, {"Cache-Control": "no-store"})


handler = answer_with(app)
