"""Run predictions on Replicate so that none is lost and none is paid for twice.

A package imports only from those below it, not from one on its own line (`make lint` checks this):

    api, intake, notifications
    batches
    recipes, pipelines
    lifecycle, views
    store
    files, intents, upstream, admission
    aws, net, validation, templating
    ids, status, errors, observability, clock

Importing this package imports none of them: each function loads only what it uses.
"""
