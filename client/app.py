"""A Flower ClientApp that hands the bytes of a message to a site: in simulations, and on a fleet of SuperNodes."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD

WHO = "site"  # key of the question which site a node is of, and of the node's configuration that answers it
SOCKET = "socket"  # key of the node's configuration: the socket that the site's process connects to
GROUP = "socket_group"  # the same: that may come in there, beside the node's user
Handler = Callable[[bytes, float], bytes]  # request, seconds until nobody waits for the answer -> answer


def client_app(connect: Callable[[Context], Handler]) -> ClientApp:
    """Return a ClientApp that hands every message to the site that `connect` finds for its context."""
    app = ClientApp()

    def carry(message: Message, context: Context) -> Message:
        content = message.content
        record = content.config_records[ENVELOPE_RECORD]
        if WHO in record:
            name = RecordDict({ENVELOPE_RECORD: ConfigRecord({WHO: str(context.node_config[WHO])})})
            return Message(name, reply_to=message)
        record[ENVELOPE_KEY] = connect(context)(cast(bytes, record[ENVELOPE_KEY]), message.metadata.ttl)
        return Message(content, reply_to=message)

    app.query()(carry)
    app.train()(carry)
    return app


def _site_process(context: Context) -> Handler:
    from client.relay import ask

    socket, group = Path(str(context.node_config[SOCKET])), str(context.node_config.get(GROUP, "")) or None
    return lambda request, seconds: ask(socket, group, request, seconds)


app = client_app(_site_process)  # of a fleet of SuperNodes: docs/flower.md
