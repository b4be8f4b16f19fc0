"""Batches: many predictions from one manifest."""
