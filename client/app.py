"""The courier: a Flower ClientApp that carries bytes between head office and a site. Imports no torch, no files."""

from collections.abc import Callable
from functools import partial
from typing import cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.wire import ask
from fedllm.messages import KEY, RECORD

SOCKET = "socket"  # key of the node's configuration that tells where the site service listens
Handler = Callable[[bytes, float], bytes]  # request, seconds until nobody waits for the answer -> answer


def courier(connect: Callable[[Context], Handler]) -> ClientApp:
    """Return a ClientApp that hands every message to the site that `connect` finds for its context."""
    app = ClientApp()

    def carry(message: Message, context: Context) -> Message:
        record = message.content.config_records[RECORD]
        record[KEY] = connect(context)(cast(bytes, record[KEY]), message.metadata.ttl)
        return Message(message.content, reply_to=message)

    app.query()(carry)
    app.train()(carry)
    return app


def _site_service(context: Context) -> Handler:
    return partial(ask, str(context.node_config[SOCKET]))


app = courier(_site_service)  # of a deployment
