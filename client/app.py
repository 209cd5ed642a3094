"""A Flower ClientApp that hands the bytes of a message to a site: for simulations."""

from collections.abc import Callable
from typing import cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm.messages import KEY, RECORD

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
