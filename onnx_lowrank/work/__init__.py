"""Work items, which describe one computation on one layer and can be sent to a process; their executors."""
