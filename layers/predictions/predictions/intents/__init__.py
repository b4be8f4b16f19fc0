"""Requests for predictions, validated before anything is written or spent."""
