"""The protocol: a prediction is submitted to Replicate at most once, and followed to its completion.

A training is a prediction with another path at Replicate, a `destination`, and a deadline that only the stack enforces.

    start             intent and claim in one write, one POST, bind; an execution tracks it from there
    submit            claim and POST, for an intent that was only written or whose POST was not accepted
    poll              without a webhook: ask Replicate, look for creates with an unknown outcome, enforce the deadline
    receive_webhook   merge what Replicate sent, and wake the execution
    archive_outputs   copy the files into the outputs bucket, then show the completion
    cancel            the owner's flag, and Replicate's cancel
    delete            the owner's flag, then the data of a completed prediction
    sweep             recover stalled predictions

Each step may run twice, late or never, and its function may crash after any line. So each begins by reading the item,
writes conditionally, and leaves `next_check_at` in the item: the time of the sweep's next check.

The rule that everything else serves: after a POST whose outcome is unknown, no second POST is sent without evidence
that the first one started nothing. A webhook binds the prediction it started, or Replicate's list shows it; or
two complete readings of that list do not (see `lifecycle.reconcile`), and it is submitted again.
"""
