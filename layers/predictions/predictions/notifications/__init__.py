"""Effects of a state change: webhooks to callers, events, and the stream consumer that triggers them."""
