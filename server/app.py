"""The ServerApp: Flower's entry point to the round loop. Imports late: Flower also loads it to look at it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from server.rounds import Coordinator


def server_app(coordinator: "Coordinator", on_error: Callable[[BaseException], None]) -> ServerApp:
    """Return a ServerApp that runs `coordinator`; an error goes to `on_error`, since Flower would only log it."""
    simulated = ServerApp()

    @simulated.main()
    def main(grid: Grid, context: Context) -> None:
        del context  # the plan is the coordinator's; Flower's run configuration is not used
        try:
            coordinator.run(grid)
        except BaseException as error:
            on_error(error)

    return simulated


app = ServerApp()  # of a deployment


@app.main()
def deployed(grid: Grid, context: Context) -> None:
    """Run what lies in the folder that the run's configuration has a ticket for.

    An error is noted in that folder alone: Flower would store its text in the SuperLink's database.
    """
    from fedllm.errors import FederationError
    from server import deployment
    from server.superlink import HOME, TICKET

    home = deployment.home_of_this_process(HOME)
    ticket = str(context.run_config[TICKET])
    name = deployment.run_of(home, ticket)
    try:
        deployment.run(grid, home, name)
    except BaseException as error:
        deployment.fail(home, name, ticket, error)
        if not isinstance(error, Exception):  # told to end
            raise
        raise FederationError("the run has ended with an error: fedllm status") from None
