"""The local Replicate: a front like Replicate's HTTP API before real Cog servers.

For tests and the local cloud; nothing of it is deployed. Run it with `python -m local.replicate`, or from
Python with `local.replicate.process.LocalReplicate`. What tests may do to it is in `local.replicate.faults`.
"""
