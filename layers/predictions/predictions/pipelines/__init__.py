"""Pipelines: predictions whose inputs depend on the outputs of others."""
