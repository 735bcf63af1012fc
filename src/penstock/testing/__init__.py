"""What ships for tests and benchmarks: checkpoints with real shapes and random weights."""
