"""The ServerApp: Flower's entry point to the round loop."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedllm.errors import ConfigError
from fedllm.messages import RECORD

if TYPE_CHECKING:
    from server.channel import Channel
    from server.rounds import Coordinator

_HOME, _RUN, _WHO = "FEDLLM_HOME", "run", "site"
_PATIENCE = 60.0  # seconds for a node to say which site it is of


def server_app(
    coordinator: "Coordinator", on_error: Callable[[BaseException], None], channel: "Channel | None" = None
) -> ServerApp:
    """Return a ServerApp that runs `coordinator`; an error goes to `on_error`, since Flower would only log it."""
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        del context  # the plan is the coordinator's; Flower's run configuration is not used
        try:
            coordinator.run(grid, channel)
        except BaseException as error:
            on_error(error)

    return made


app = ServerApp()  # of a fleet of SuperNodes: docs/flower.md


@app.main()
def on_a_fleet(grid: Grid, context: Context) -> None:
    """Run what `fedllm submit --prepare` prepared in head office's folder, over Flower's own SuperLink."""
    from server import deployment

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
        question = RecordDict({RECORD: ConfigRecord({_WHO: ""})})
        asked = [Message(question, node, "query", ttl=_PATIENCE) for node in online - set(self._known)]
        for reply in self._grid.send_and_receive(asked, timeout=_PATIENCE) if asked else ():
            record = None if reply.has_error() else reply.content.config_records.get(RECORD)
            if record is not None and _WHO in record:
                self._known[reply.metadata.src_node_id] = str(record[_WHO])
        return {node: site for node, site in self._known.items() if node in online}
