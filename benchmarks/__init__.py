"""Benchmarks: named problems, bounds, the round on a GPU, and the comparison on a CPU."""
