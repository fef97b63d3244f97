"""What studies found, put together: `side_by_side` makes the tables of docs/benchmarks.md about a pretrained model."""
