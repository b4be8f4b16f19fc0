"""How Replicate is asked for a prediction: what runs it, and where Replicate reports on it."""

from predictions.aws.clients import api_url
from predictions.store.records import Prediction
from predictions.upstream.client import Target


def target_of(prediction: Prediction) -> Target:
    """Return what runs a prediction, or is trained."""
    if prediction.object == "training":
        return Target("training", prediction.name, prediction.version)
    if prediction.kind == "deployment":
        return Target("deployment", prediction.name)
    if prediction.version is None:
        return Target("model", prediction.name)
    return Target("version", prediction.name, prediction.version)


def webhook_of(prediction_id: str) -> str:
    """Return the URL at which Replicate reports on a prediction.

    The whole URL tells whose an entry is: a prediction of another stack of the same account may have the same id.
    """
    return f"{api_url()}/webhooks/replicate/{prediction_id}"
