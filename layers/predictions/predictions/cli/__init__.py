"""The command line `replicate-serverless`, one module per subject; the layer does not ship it."""
