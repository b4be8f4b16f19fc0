"""AWS clients and helpers for each service, without knowledge of predictions."""
