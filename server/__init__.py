"""The server: the Flower ServerApp with its round loop, aggregation and checkpoints."""
