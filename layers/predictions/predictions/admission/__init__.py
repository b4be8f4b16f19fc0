"""Admission: the rate limiter and the quotas of owners."""
