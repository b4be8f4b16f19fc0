"""Replicate's API: its client, its predictions, its input schemas."""
