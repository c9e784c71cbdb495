"""The binary messages, against the package's own encoder and decoder."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)

from loraplex_server.api.compat.tinker_messages import (
    SampledSequence,
    forward_backward_output,
    read_forward_backward,
    sample_response,
)
from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.errors import ApiError

_FLOATS = st.floats(-50, 0, width=32)
_IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40)


@given(
    st.lists(st.tuples(_IDS, st.lists(_FLOATS, max_size=9)), max_size=5),
    st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False) | st.text(max_size=9)),
    st.integers(1, 2**31 - 1),
    st.booleans(),
)
def test_a_call_is_read_as_the_package_wrote_it(
    data: list[tuple[list[int], list[float]]],
    config: dict[str, float | str],
    seq_id: int,
    forward_only: bool,
) -> None:
    sent = [
        types.Datum(
            types.ModelInput.from_ints(ids[:2]).append(types.EncodedTextChunk(tokens=ids[2:])),
            {"target_tokens": ids, "weights": weights},  # type: ignore[dict-item]
        )
        for ids, weights in data
    ]
    call = types.ForwardBackwardInput(data=sent, loss_fn="ppo", loss_fn_config=config)
    message = forward_backward_request_to_proto(types.ForwardBackwardRequest(call, "m", seq_id))
    message.forward_only = forward_only
    read = read_forward_backward(message.SerializeToString())
    assert (read.model_id, read.seq_id, read.loss) == ("m", seq_id, "ppo")
    assert (read.config, read.forward_only, read.problem) == (config, forward_only, None)
    for datum, (ids, weights) in zip(read.data, data, strict=True):
        assert datum.tokens.tolist() == datum.inputs["target_tokens"].tolist() == ids
        assert datum.inputs["weights"].tolist() == weights


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused_or_read(body: bytes) -> None:
    with contextlib.suppress(ApiError):
        read_forward_backward(body)


@given(st.lists(st.lists(_FLOATS, max_size=9), max_size=5), st.floats(allow_nan=False))
def test_the_package_reads_an_output(logprobs: list[list[float]], loss: float) -> None:
    arrays = [np.array(each, np.float32) for each in logprobs]
    read = deserialize_forward_backward_output(forward_backward_output(arrays, loss))
    assert read.metrics == {"loss:sum": loss}
    assert [each["logprobs"].data for each in read.loss_fn_outputs] == logprobs


@given(st.lists(st.tuples(_IDS, st.booleans()), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
def test_the_package_reads_samples(sequences: list[tuple[list[int], bool]], n_cached: int) -> None:
    def row(token: int) -> TokenLogprobs:
        return TokenLogprobs(token, -0.5, ((token, -0.5), (1, -2.0)))

    sent = [SampledSequence(ids, [row(i) for i in ids], full) for ids, full in sequences]
    message = sample_response(sent, [None, row(3)], n_top=2, n_top_of_prompt=1, n_cached=n_cached)
    read = deserialize_sample_response(message)
    assert read.prompt_cache_hit_tokens == n_cached
    assert read.prompt_logprobs == [None, -0.5]
    assert read.topk_prompt_logprobs == [None, [(3, -0.5)]]
    for each, (ids, full) in zip(read.sequences, sequences, strict=True):
        assert each.tokens == ids
        assert each.logprobs == [-0.5] * len(ids)
        assert each.topk_logprobs == [[(i, -0.5), (1, -2.0)] for i in ids]
        assert each.stop_reason == ("length" if full else "stop")


def test_a_picture_is_a_problem_of_its_datum() -> None:
    image = types.ImageChunk(data=b"x", format="png", expected_tokens=1)
    sent = [types.Datum(types.ModelInput(chunks=[image]), {})]
    call = types.ForwardBackwardInput(data=sent, loss_fn="cross_entropy")
    message = forward_backward_request_to_proto(types.ForwardBackwardRequest(call, "m", 1))
    problem = read_forward_backward(message.SerializeToString()).problem
    assert problem is not None
    with pytest.raises(ApiError, match=r"data\[0\]: the model takes tokens only"):
        raise problem
