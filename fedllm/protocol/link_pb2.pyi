from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromSite(_message.Message):
    __slots__ = ("hello", "answer", "refusal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    answer: Part
    refusal: Refusal
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., answer: _Optional[_Union[Part, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class ToSite(_message.Message):
    __slots__ = ("welcome", "request", "cancel", "end")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    request: Part
    cancel: Cancel
    end: End
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., request: _Optional[_Union[Part, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "software", "clock")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    clock: int
    def __init__(self, version: _Optional[int] = ..., software: _Optional[str] = ..., clock: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("software", "clock")
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    software: str
    clock: int
    def __init__(self, software: _Optional[str] = ..., clock: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("id", "size", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    size: int
    data: bytes
    def __init__(self, id: _Optional[bytes] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("id", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    text: str
    def __init__(self, id: _Optional[bytes] = ..., text: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("text", "displaced")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DISPLACED_FIELD_NUMBER: _ClassVar[int]
    text: str
    displaced: bool
    def __init__(self, text: _Optional[str] = ..., displaced: _Optional[bool] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("part", "refused", "gone")
    PART_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    part: Part
    refused: str
    gone: str
    def __init__(self, part: _Optional[_Union[Part, _Mapping]] = ..., refused: _Optional[str] = ..., gone: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("site", "part")
    SITE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    site: str
    part: Part
    def __init__(self, site: _Optional[str] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sites(_message.Message):
    __slots__ = ("connected", "refused")
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    connected: _containers.RepeatedCompositeFieldContainer[Connected]
    refused: _containers.RepeatedCompositeFieldContainer[Refused]
    def __init__(self, connected: _Optional[_Iterable[_Union[Connected, _Mapping]]] = ..., refused: _Optional[_Iterable[_Union[Refused, _Mapping]]] = ...) -> None: ...

class Connected(_message.Message):
    __slots__ = ("site", "address", "software", "since", "ahead")
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
    def __init__(self, site: _Optional[str] = ..., address: _Optional[str] = ..., software: _Optional[str] = ..., since: _Optional[int] = ..., ahead: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("site", "text", "at", "times")
    SITE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    site: str
    text: str
    at: int
    times: int
    def __init__(self, site: _Optional[str] = ..., text: _Optional[str] = ..., at: _Optional[int] = ..., times: _Optional[int] = ...) -> None: ...
