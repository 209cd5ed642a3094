"""Benchmarks on public models and data: each runs `fedllm simulate` with a fixed configuration and tabulates it."""
