"""What tests and benchmarks share: named cases, the numpy oracle, tolerances."""
