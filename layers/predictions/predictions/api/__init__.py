"""The HTTP API: routing, access tokens, paging and the routes that are proxied to Replicate."""
