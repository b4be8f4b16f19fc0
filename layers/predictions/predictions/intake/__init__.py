"""Requests that do not come over HTTP: the requests queue and direct invocations."""
