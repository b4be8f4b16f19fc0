"""The protocol: a wanted prediction is submitted to Replicate at most once, and followed until it has ended.

A training is a prediction to it: another path at Replicate, a `destination`, and a deadline that we alone keep.

    start             intent and claim in one write, one POST, bind; an execution tracks it from there
    submit            claim and POST, for an intent that was only written down or whose POST was not accepted
    poll              what no webhook told: ask, look for creates of unknown outcome, enforce the deadline
    receive_webhook   what Replicate tells: merge, and wake the execution
    archive_outputs   the files of what has ended go to the outputs bucket, then callers see the end
    cancel            the owner's flag, and Replicate's cancel
    delete            the owner's flag, then the data of what has ended
    sweep             whatever stands still is moved on

Each step may happen twice, late or never, and its function may die after any line. So each begins by reading what is
there, writes on condition, and leaves `next_check_at` in the item: when that passes, the sweep looks.

The one rule that everything else serves: after a POST whose outcome is unknown there is no second POST without
evidence that the first one started nothing. A webhook binds the prediction it started, or Replicate's list shows it; or
two complete readings of that list do not (see `lifecycle.reconcile`), and it is submitted again.
"""
