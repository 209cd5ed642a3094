"""The ServerApp: Flower's entry point to the round loop."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from server.channel import Channel
    from server.rounds import Coordinator


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
