"""A federation on one machine: partitions, backends, the demo's model and corpus, benchmarks."""
