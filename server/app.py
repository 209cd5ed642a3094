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
    """Run what lies in the folder that the run's configuration names."""
    from server import deployment
    from server.superlink import HOME, RUN

    home, name = deployment.home_of_this_process(HOME), str(context.run_config[RUN])
    try:
        deployment.run(grid, home, name)
    except BaseException as error:
        deployment.fail(home, name, error)
        raise
