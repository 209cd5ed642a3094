"""The usual Flower arrangement, to compare with: the ClientApp itself loads model and adapter for every message.

And the floor under both: apps that exchange a few bytes and do nothing.
"""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

ROUNDS, RESULT = 4, "benchmark.json"
SETTINGS = "FEDLLM_BENCHMARK"  # environment: the JSON file with settings

# Flower looks these up by their assignments, one a line
floor_client = ClientApp()
stock_client = ClientApp()
server = ServerApp()


@floor_client.train()
def nothing(message: Message, context: Context) -> Message:
    """Send back what came."""
    del context
    return Message(message.content, reply_to=message)


@stock_client.train()
def train(message: Message, context: Context) -> Message:
    """Load the model, put on the adapter that came, train a step, send the adapter back."""
    del context
    began = time.monotonic()
    from simulations.benchmarks.stock_training import train_once

    settings = json.loads(Path(os.environ[SETTINGS]).read_text("utf-8"))
    arrays = {name: array.numpy() for name, array in message.content.array_records["adapter"].items()}
    trained, seconds = train_once(settings["model"], arrays, settings["batch"], settings["tokens"])
    record = ArrayRecord({name: Array(value) for name, value in trained.items()})
    metrics = MetricRecord({
        "training": seconds,
        "all": time.monotonic() - began,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bytes": float(sum(value.nbytes for value in trained.values())),
    })  # fmt: skip
    return Message(RecordDict({"adapter": record, "metrics": metrics}), reply_to=message)


@server.main()
def rounds(grid: Grid, context: Context) -> None:
    """Exchange a message with every node, several times, and note how long each exchange took."""
    folder = Path(str(context.run_config["ticket"]))
    settings = json.loads(Path(os.environ[SETTINGS]).read_text("utf-8"))
    while len(nodes := list(grid.get_node_ids())) < settings["nodes"]:
        time.sleep(0.5)
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    if settings["stock"]:
        shapes = settings["adapter"]
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        content = RecordDict({"adapter": ArrayRecord({name: Array(value) for name, value in arrays.items()})})
    measured = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        waiting = set(grid.push_messages([Message(content, node, "train") for node in nodes]))
        replies = []
        while waiting:  # as our own coordinator looks, which is more often than Flower's send_and_receive
            found = list(grid.pull_messages(list(waiting)))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            time.sleep(0.25 if waiting else 0)
        errors = [str(reply.error) for reply in replies if reply.has_error()]
        if errors:
            raise RuntimeError(errors[0])
        figures = [dict(reply.content.metric_records.get("metrics", {})) for reply in replies]
        measured.append({"seconds": time.monotonic() - began, "sites": figures})
    (folder / RESULT).write_text(json.dumps(measured), "utf-8")
