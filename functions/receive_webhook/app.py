"""Webhook route for Replicate: public, so all of it is checked, and the function holds no Replicate token."""

import time

from predictions.api.app import all_headers_of, answer_with, body_of, json_response, resolver
from predictions.api.routing import Response
from predictions.errors import Problem
from predictions.ids import is_id
from predictions.lifecycle.orphan_polls import OrphanPolls
from predictions.lifecycle.receive_webhook import receive
from predictions.net.signatures import SigningSecretUnavailable, WebhookRefused
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.upstream.signing_secret import SigningSecrets

app = resolver()
table = PredictionsTable.from_env()
secrets = SigningSecrets.from_env()
polls = OrphanPolls.from_env()


@app.post("/webhooks/replicate/<prediction_id>")
def webhook(prediction_id: str) -> Response:
    """`POST /webhooks/replicate/{id}`: 200 if genuine, 401 if not, 503 for faults of the stack."""
    now = time.time()
    body = body_of(app)
    try:
        secrets.verify(body, all_headers_of(app), now)
    except WebhookRefused as error:
        logger.warning("webhook refused", reason=str(error))
        metrics.add_metric(name="WebhooksRejected", unit=MetricUnit.Count, value=1)
        # One response for every reason: a forger learns nothing from it.
        raise Problem(401, "This is not a webhook that Replicate signed for this stack.") from None
    except SigningSecretUnavailable as error:
        logger.error("no signing secret", reason=str(error))
        detail = "Replicate's signing secret is not known yet: send the webhook again."
        raise Problem(503, detail, headers={"Retry-After": "10"}) from None
    receipt = receive(table, prediction_id, body, now, polls) if is_id(prediction_id) else "unknown prediction"
    return json_response(200, {"received": receipt})


handler = answer_with(app)
