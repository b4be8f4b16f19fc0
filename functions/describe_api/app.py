"""The route that describes the API, as an OpenAPI document."""

from aws_lambda_powertools.event_handler import Response
from predictions.api import answer_with, json_response, owner_with, resolver
from predictions.aws import api_url
from predictions.description import describe

app = resolver()


@app.get("/openapi.json")
def document() -> Response[str]:
    """`GET /openapi.json`: this stack's own OpenAPI 3.1 document."""
    owner_with(app, "read")
    return json_response(200, describe(api_url()))


handler = answer_with(app)
