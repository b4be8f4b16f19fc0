"""The HTTP API: routing, access tokens, paging and the routes that pass requests on to Replicate."""
