"""Whether and when a prediction may start: the rate limiter and the quotas of owners."""
