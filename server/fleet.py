"""The ServerApp on a fleet of Flower's own SuperNodes, where others have one: docs/flower.md."""

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedllm.errors import ConfigError
from fedllm.protocol.messages import ENVELOPE_RECORD
from server import deployment

_HOME, _RUN, _WHO = "FEDLLM_HOME", "run", "site"
_PATIENCE = 60.0  # seconds for a node to say which site it is of

app = ServerApp()


@app.main()
def on_a_fleet(grid: Grid, context: Context) -> None:
    """Run what `fedllm submit --prepare` prepared in the server's folder, over Flower's own SuperLink."""
    home, name = os.environ.get(_HOME), str(context.run_config.get(_RUN, ""))
    if not home or not name:
        raise ConfigError(f"set {_HOME} for the SuperLink, and name a prepared run: --run-config '{_RUN}=\"first\"'")
    deployment.run(Path(home), name, (grid, Nodes(grid).sites))


class Nodes:
    """Which site is behind each of Flower's nodes, as the node says; what is sealed to a site, it alone opens."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._known: dict[int, str] = {}

    def sites(self) -> dict[int, str]:
        """Return the nodes that are online and their sites."""
        online = set(self._grid.get_node_ids())
        question = RecordDict({ENVELOPE_RECORD: ConfigRecord({_WHO: ""})})
        asked = [Message(question, node, "query", ttl=_PATIENCE) for node in online - set(self._known)]
        for reply in self._grid.send_and_receive(asked, timeout=_PATIENCE) if asked else ():
            record = None if reply.has_error() else reply.content.config_records.get(ENVELOPE_RECORD)
            if record is not None and _WHO in record:
                self._known[reply.metadata.src_node_id] = str(record[_WHO])
        return {node: site for node, site in self._known.items() if node in online}
