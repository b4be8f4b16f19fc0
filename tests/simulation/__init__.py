"""The real library, handlers and state machine under seeded schedules of faults, in virtual time: see `schedule`."""
