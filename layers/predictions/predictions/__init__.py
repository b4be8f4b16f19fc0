"""Runs predictions on Replicate so that none is lost and none is paid for twice.

A package imports only from those below it, and packages of one line do not know each other (`make lint` checks this):

    api, intake, notifications
    batches
    recipes, pipelines
    lifecycle, views
    store
    files, intents, upstream, admission
    aws, net, validation, templating
    ids, status, errors, observability, clock

Importing this package imports none of them: each function pays only for what it uses.
"""
