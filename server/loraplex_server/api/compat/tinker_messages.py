"""Tinker's binary messages: protobuf with arrays as packed little-endian bytes.

Numbers of fields are those of ``tinker.proto.tinker_public_pb2`` in the package tinker 0.38.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.errors import ApiError, invalid

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FLOAT32, _INT64 = 1, 2  # values of DType
_STOP, _LENGTH = 0, 1  # values of StopReason
_DTYPES = {_FLOAT32: "<f4", _INT64: "<i8", 3: "<i4"}
_NO_LOGPROB = -99999.0  # in an empty cell of the most likely tokens
Array = NDArray[np.int64] | NDArray[np.float32]


@dataclass(slots=True)
class WireDatum:
    tokens: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    inputs: dict[str, Array] = field(default_factory=dict)  # of the loss, by name


@dataclass(slots=True)
class ForwardBackwardRequest:
    model_id: str = ""
    seq_id: int = 0
    data: list[WireDatum] = field(default_factory=list)
    loss: str = ""
    config: dict[str, float | str] = field(default_factory=dict)  # of the loss
    forward_only: bool = False
    problem: ApiError | None = None  # of the data: the call takes its turn and fails


def read_forward_backward(body: bytes) -> ForwardBackwardRequest:
    """Parse the body of a call. Raises ApiError (400) if it has no model or is no such message."""
    request = ForwardBackwardRequest()
    for number, value in _fields(memoryview(body)):
        match number:
            case 1:
                request.model_id = _text(value)
            case 2:
                request.seq_id = _int(value)
            case 3:
                try:
                    request.data.append(_datum(_part(value)))
                except ApiError as error:
                    at = f"data[{len(request.data)}]"
                    request.problem = request.problem or invalid(f"{at}: {error.message}", at)
            case 4:
                request.loss = _text(value)
            case 5:
                key, entry = _entry(_part(value))
                request.config.setdefault(key, _double(entry))
            case 6:
                request.forward_only = bool(_int(value))
            case 7:
                key, entry = _entry(_part(value))
                for kind, setting in _fields(entry):
                    request.config[key] = _double(setting) if kind == 1 else _text(setting)
    return request


def forward_backward_output(logprobs: Sequence[Array], loss: float) -> bytes:
    """Return the log-probabilities of each datum's targets, and the summed loss."""
    ends = np.cumsum([0, *(4 * len(each) for each in logprobs)], dtype="<i8")
    data = b"".join(np.asarray(each, "<f4").tobytes() for each in logprobs)
    tensor = _bytes(1, data) + _bytes(2, ends.tobytes()) + _varint_field(3, _FLOAT32)
    fields = _bytes(1, b"logprobs") + _bytes(2, tensor)
    record = _bytes(2, fields) + _varint_field(3, len(logprobs))
    metric = _bytes(1, b"loss:sum") + _key(2, _FIXED64) + struct.pack("<d", loss)
    return _bytes(1, b"ArrayRecord") + _bytes(2, record) + _bytes(3, metric)


@dataclass(frozen=True, slots=True)
class SampledSequence:
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    is_full: bool  # it ended at the limit of tokens


def sample_response(
    sequences: Sequence[SampledSequence],
    prompt: Sequence[TokenLogprobs | None] | None,
    *,
    n_top: int,
    n_top_of_prompt: int,
    n_cached: int,
) -> bytes:
    """Return sampled sequences. ``prompt``: log-probabilities of its tokens, if requested."""
    message = b""
    for sequence in sequences:
        part = _varint_field(1, _LENGTH if sequence.is_full else _STOP)
        part += _bytes(2, np.array(sequence.tokens, "<i4").tobytes())
        part += _bytes(3, np.array([row.logprob for row in sequence.logprobs], "<f4").tobytes())
        if n_top:
            part += _bytes(4, _most_likely(sequence.logprobs, n_top))
        message += _bytes(1, part)
    if prompt is not None:
        values = [float("nan") if row is None else row.logprob for row in prompt]
        message += _bytes(2, np.array(values, "<f4").tobytes())
        if n_top_of_prompt:
            message += _bytes(3, _most_likely(prompt, n_top_of_prompt))
    return message + _varint_field(4, n_cached)


def _most_likely(rows: Sequence[TokenLogprobs | None], n_top: int) -> bytes:
    tokens = np.zeros((len(rows), n_top), "<i4")
    logprobs = np.full((len(rows), n_top), _NO_LOGPROB, "<f4")
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row.top[:n_top] if row is not None else ()):
            tokens[i, j], logprobs[i, j] = token, logprob
    arrays = _bytes(1, tokens.tobytes()) + _bytes(2, logprobs.tobytes())
    return arrays + _varint_field(3, n_top) + _varint_field(4, len(rows))


def _datum(message: memoryview) -> WireDatum:
    datum, chunks = WireDatum(), []
    for number, value in _fields(message):
        if number == 1:
            for kind, chunk in _fields(_part(value)):
                if kind != 1:
                    raise invalid("the model takes tokens only, no images or sounds", None)
                chunks += [_array(_part(v), "<i4") for n, v in _fields(_part(chunk)) if n == 1]
        elif number == 2:
            key, tensor = _entry(_part(value))
            datum.inputs[key] = _tensor(key, tensor)
    datum.tokens = np.concatenate(chunks).astype(np.int64) if chunks else datum.tokens
    return datum


def _tensor(name: str, message: memoryview) -> Array:
    """Return a tensor of one dimension."""
    data, dtype, shape = memoryview(b""), 0, 1
    for number, value in _fields(message):
        if number == 2:
            raise invalid(f"{name} is sparse; send a dense tensor of one dimension", name)
        if number == 1:
            data = _part(value)
        elif number == 3:
            dtype = _int(value)
        elif number == 4:  # packed
            shape = 1 if isinstance(value, int) else sum(byte < 128 for byte in _part(value))
    if dtype not in _DTYPES or shape > 1:
        raise invalid(f"{name} must be a tensor of float32 or int64 of one dimension", name)
    array = _array(data, _DTYPES[dtype])
    return array.astype(np.float32) if dtype == _FLOAT32 else array.astype(np.int64)


def _array(data: memoryview, dtype: str) -> NDArray[Any]:
    if len(data) % np.dtype(dtype).itemsize:
        raise _malformed()
    return np.frombuffer(data, dtype)


def _entry(message: memoryview) -> tuple[str, memoryview]:
    """Return an entry of a map. Zero may be absent."""
    key, value = "", memoryview(b"")
    for number, each in _fields(message):
        if number == 1:
            key = _text(each)
        elif number == 2:
            value = _part(each)
    return key, value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number of each field with its integer or its bytes. Raises ApiError (400)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _malformed()
        if at + size > len(message):
            raise _malformed()
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise _malformed()


def _part(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _malformed()
    return value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _malformed()
    return value


def _text(value: int | memoryview) -> str:
    try:
        return str(_part(value), "utf-8")
    except UnicodeDecodeError:
        raise _malformed() from None


def _double(value: int | memoryview) -> float:
    part = _part(value)
    if len(part) not in (0, 8):
        raise _malformed()
    return float(struct.unpack("<d", part)[0]) if part else 0.0


def _malformed() -> ApiError:
    return invalid("the body is no message of Tinker's protocol", None, "invalid_protobuf")


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])  # numbers below 16


def _varint_field(number: int, value: int) -> bytes:
    encoded = _key(number, _VARINT)
    while value > 127:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    return encoded + bytes([value])


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint_field(0, len(value))[1:] + value
