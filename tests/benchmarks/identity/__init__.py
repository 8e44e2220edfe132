"""The parts of `bench_identity.py`: the cases, their inputs, the runs of both sides, and the comparison."""
