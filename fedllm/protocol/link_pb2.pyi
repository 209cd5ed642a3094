from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import containers as _containers

DESCRIPTOR: _descriptor.FileDescriptor

class FromSite(_message.Message):
    __slots__ = ("answer", "hello", "refusal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    answer: Part
    refusal: Refusal
    def __init__(self, hello: Hello | _Mapping | None = ..., answer: Part | _Mapping | None = ..., refusal: Refusal | _Mapping | None = ...) -> None: ...

class ToSite(_message.Message):
    __slots__ = ("cancel", "request", "welcome")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    request: Part
    cancel: Cancel
    def __init__(self, welcome: Welcome | _Mapping | None = ..., request: Part | _Mapping | None = ..., cancel: Cancel | _Mapping | None = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("clock", "software", "version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    clock: int
    def __init__(self, version: int | None = ..., software: str | None = ..., clock: int | None = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("clock", "software")
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    software: str
    clock: int
    def __init__(self, software: str | None = ..., clock: int | None = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("data", "id", "size")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    size: int
    data: bytes
    def __init__(self, id: bytes | None = ..., size: int | None = ..., data: bytes | None = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("id", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    text: str
    def __init__(self, id: bytes | None = ..., text: str | None = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: bytes | None = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("part", "site")
    SITE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    site: str
    part: Part
    def __init__(self, site: str | None = ..., part: Part | _Mapping | None = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: str | None = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sites(_message.Message):
    __slots__ = ("connected", "refused")
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    connected: _containers.RepeatedCompositeFieldContainer[Connected]
    refused: _containers.RepeatedCompositeFieldContainer[Refused]
    def __init__(self, connected: _Iterable[Connected | _Mapping] | None = ..., refused: _Iterable[Refused | _Mapping] | None = ...) -> None: ...

class Connected(_message.Message):
    __slots__ = ("address", "ahead", "since", "site", "software")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    site: str
    address: str
    software: str
    since: int
    ahead: int
    def __init__(self, site: str | None = ..., address: str | None = ..., software: str | None = ..., since: int | None = ..., ahead: int | None = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("at", "site", "text", "times")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    site: str
    text: str
    at: int
    times: int
    def __init__(self, site: str | None = ..., text: str | None = ..., at: int | None = ..., times: int | None = ...) -> None: ...
