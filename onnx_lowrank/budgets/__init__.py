"""What a ratio counts."""
