"""Runs predictions on Replicate so that none is lost and none is paid for twice.

One module for each durable thing: `table` (DynamoDB), `outputs` (S3), `upstream` (Replicate), `executions`
(Step Functions), `webhooks` (Replicate's signatures), `access` (tokens). `lifecycle` moves a prediction from
intent to end with them; `intents` and `api` are its face towards callers. `forwarding` passes on
what is about none of that.

Importing this package imports none of them: each function pays only for what it uses.
"""
