"""The command line `replicate-serverless`, one module per subject.

The layer does not ship this package.
"""
