"""Requests for predictions, checked before anything is written or spent."""
