"""Model, adapter, data, DP engine, trainer and evaluation: everything that needs torch."""
