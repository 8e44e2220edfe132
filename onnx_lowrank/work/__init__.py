"""Work items: values that describe one computation on one layer and can travel, and their executors."""
