"""The local Replicate: an HTTP server like Replicate's API in front of real Cog servers.

For tests and the local cloud; never deployed. Run it with `python -m local.replicate`, or from Python with
`local.replicate.process.LocalReplicate`. Tests inject faults with `local.replicate.faults`.
"""
