"""What follows a state change: webhooks to callers, events, and the stream that starts them."""
