"""Requests that do not arrive over HTTP: the requests queue and direct invocations."""
