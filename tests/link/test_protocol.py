"""The link's frames: what is checked in belongs to link.proto, and what is malformed is one error."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import MessageError
from fedllm.protocol import link_pb2
from fedllm.protocol.link import PART, Payload, parts, read, request_id
from fedllm.protocol.link_pb2 import FromSite, Part, ToSite

ROOT = Path(__file__).parents[2]
GENERATE = "python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. fedllm/protocol/link.proto"
needs_tools = pytest.mark.skipif(find_spec("grpc_tools") is None, reason="grpcio-tools is not installed")


def compile_to(*flags: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *flags, "fedllm/protocol/link.proto"]
    subprocess.run(command, check=True, cwd=ROOT)


@needs_tools
def test_the_generated_module_belongs_to_the_proto_file(tmp_path: Path) -> None:
    compile_to(f"--descriptor_set_out={tmp_path / 'set'}")
    [made] = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    for field in (field for message in made.message_type for field in message.field):
        field.ClearField("json_name")  # protoc fills it in
    kept = FileDescriptorProto.FromString(link_pb2.DESCRIPTOR.serialized_pb)
    assert kept == made, f"link.proto has changed. Run: {GENERATE}"


@needs_tools
def test_the_generated_types_belong_to_the_proto_file(tmp_path: Path) -> None:
    compile_to(f"--pyi_out={tmp_path}")
    made = (tmp_path / "fedllm" / "protocol" / "link_pb2.pyi").read_text("utf-8")
    assert (ROOT / "fedllm" / "protocol" / "link_pb2.pyi").read_text("utf-8") == made, f"Run: {GENERATE}"


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART])
def test_parts_join_to_what_was_cut(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    cut = list(parts(request_id(data), data))
    assert max(len(part.data) for part in cut) <= PART
    payload = Payload(cut[0], size)
    found = [payload.add(part) for part in cut]
    assert found[:-1] == [None] * (len(cut) - 1)
    assert found[-1] == data


def test_a_payload_over_the_limit_is_refused_by_its_first_part() -> None:
    with pytest.raises(MessageError, match="at most 9 are taken"):
        Payload(Part(size=10), 9)
    with pytest.raises(MessageError):
        Payload(Part(size=1 << 63), 1 << 40)


@pytest.mark.parametrize(
    "later",
    [Part(size=9, data=b"x"), Part(size=10), Part(size=10, data=b"x" * 11), Part(size=10, data=b"x" * 6)],
    ids=["another size", "empty", "too much at once", "too much"],
)
def test_parts_that_do_not_fit_together_are_refused(later: Part) -> None:
    payload = Payload(Part(size=10), 10)
    assert payload.add(Part(size=10, data=b"12345")) is None
    with pytest.raises(MessageError, match="do not fit"):
        payload.add(later)


@given(st.binary(max_size=300), st.sampled_from([FromSite, ToSite, Part]))
def test_malformed_frames_raise_one_type_of_error(
    data: bytes, kind: type[FromSite] | type[ToSite] | type[Part]
) -> None:
    try:
        read(kind, data)  # type: ignore[type-var]
    except MessageError:
        return


@given(st.lists(st.builds(Part, size=st.integers(0, 40), data=st.binary(max_size=20)), min_size=1))
def test_a_payload_is_whole_or_refused(found: list[Part]) -> None:
    try:
        payload = Payload(found[0], 30)
        for number, part in enumerate(found):
            whole = payload.add(part)
            if whole is not None:
                assert whole == b"".join(each.data for each in found[: number + 1])
                assert len(whole) == found[0].size
                return
    except MessageError:
        return
