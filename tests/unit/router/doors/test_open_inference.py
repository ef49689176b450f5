"""Tensors of the Open Inference Protocol -> requests: every name understood, or refused with cause and fix."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from diptych.inference import open_inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from router.doors.open_inference.request import INPUTS, OUTPUTS, Wanted
from router.doors.open_inference.wire import answer_to_wire, error_to_wire, metadata_to_wire, wanted_from_wire
from router.errors import Code, Failure, RequestRefused
from router.request import Beams

MODEL = "m"
CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
CODES = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f"}


def raw_of(datatype: str, values: Any) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(v)) + v for v in values)
    return struct.pack(f"<{len(values)}{CODES[datatype]}", *values)


def request(
    *, raw: bool = False, outputs: tuple[str, ...] = (), model: str = MODEL, **tensors: tuple[str, Any]
) -> pb.ModelInferRequest:
    """tensor = (datatype, values) or (datatype, values, shape)."""
    message = pb.ModelInferRequest(model_name=model, id="7")
    for name, (datatype, values, *shape) in tensors.items():
        tensor = message.inputs.add(name=name, datatype=datatype, shape=shape[0] if shape else [len(values)])
        if raw:
            message.raw_input_contents.append(raw_of(datatype, values))
        else:
            getattr(tensor.contents, CONTENTS[datatype]).extend(values)
    for name in outputs:
        message.outputs.add(name=name)
    return message


PROMPT = ("BYTES", [b"Hello"])


def wanted(**tensors: Any) -> Wanted:
    return wanted_from_wire(request(text_input=PROMPT, **tensors), (MODEL,))


def refusal(message: pb.ModelInferRequest) -> Failure:
    with pytest.raises(RequestRefused) as refused:
        wanted_from_wire(message, (MODEL,))
    assert "; " in refused.value.failure.message, "the cause, and the fix"
    return refused.value.failure


@pytest.mark.parametrize("raw", [False, True])
def test_the_tensors_of_triton_backends(raw: bool) -> None:
    got = wanted_from_wire(
        request(
            raw=raw,
            text_input=("BYTES", [b"Hello"], [1, 1]),
            stream=("BOOL", [True]),
            max_tokens=("INT32", [9], [1, 1]),
            temperature=("FP32", [0.5]),
            top_p=("FP32", [0.25]),
            top_k=("INT32", [3]),
            random_seed=("UINT64", [1 << 63]),
            stop_words=("BYTES", [b"a", b"", b"\xc3\xa9"], [1, 3]),
            end_id=("INT32", [2]),
            pad_id=("INT32", [2]),
            beam_width=("INT32", [1]),
            bad_words=("BYTES", [b"", b"ugh"]),
        ),
        ("other", MODEL),
    )
    s = got.raw.sampling
    assert (got.raw.text, got.stream, got.outputs) == ("Hello", True, ("text_output", "finish_reason"))
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.seed) == (9, 0.5, 0.25, 3, 1 << 63)
    assert (s.stop, s.stop_token_ids, s.bad_words) == (("a", "é"), (2,), ("ugh",))


def test_vllm_sampling_parameters_are_json_with_numbers_or_strings() -> None:
    text = json.dumps(
        {"temperature": "0.5", "max_tokens": 7, "stop": "x", "seed": "5", "top_k": -1, "n": 1, "ignore_eos": True}
    )
    s = wanted(sampling_parameters=("BYTES", [text.encode()]), max_tokens=("INT32", [7])).raw.sampling
    assert (s.temperature, s.max_tokens, s.stop, s.seed, s.top_k, s.ignore_eos) == (0.5, 7, ("x",), 5, 0, True)
    text = json.dumps({"bad_words": ["ugh"], "allowed_token_ids": [4, 5], "skip_special_tokens": False})
    s = wanted(sampling_parameters=("BYTES", [text.encode()])).raw.sampling
    assert (s.skip_special, s.include_stop) == (False, False)
    assert (s.bad_words, s.allowed_token_ids) == (("ugh",), (4, 5))


def test_beams_by_either_name() -> None:
    penalty, early = ("FP32", [2.0]), ("BOOL", [True])
    got = wanted(beam_width=("INT32", [4]), length_penalty=penalty, early_stopping=early)
    assert (got.n, got.raw.sampling.beams) == (4, Beams(4, 4, 2.0, True))
    text = json.dumps({"use_beam_search": True, "n": 2, "best_of": 5, "early_stopping": "never"})
    got = wanted(sampling_parameters=("BYTES", [text.encode()]))
    assert (got.n, got.raw.sampling.beams) == (2, Beams(5, 2, 1.0, "never"))
    alone = wanted(length_penalty=penalty, early_stopping=early).raw.sampling
    assert alone.beams is None, "without beams they change nothing"


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ('{"n": 129}', "use 1 to 128"),
        ('{"n": 0}', "use 1 to 128"),
        ('{"n": 2, "best_of": 3}', "best_of"),
        ('{"temprature": 1}', "'temprature'"),
        ('{"max_tokens": 1.5}', "max_tokens"),
        ('{"max_tokens": "many"}', "max_tokens"),
        ('{"max_tokens": -1}', "max_tokens"),
        ('{"max_tokens": true}', "max_tokens"),
        ('{"temperature": [1]}', "temperature"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature"),
        ('{"stop": 3}', "stop"),
        ('{"stop_token_ids": "3"}', "stop_token_ids"),
        ('{"ignore_eos": 1}', "ignore_eos"),
        ('{"allowed_token_ids": []}', "allowed_token_ids"),
        ('{"allowed_token_ids": [-1]}', "a token id"),
        ('{"bad_words": [3]}', "bad_words"),
        ('{"bad_words": [' + ",".join(['"x"'] * 257) + "]}", "limit is 256"),
        ('{"logprobs": 3}', "logprobs"),
        ("[1]", "one object"),
        ("[" * 100_000, "longer than"),
        ("[" * 60_000, "not JSON"),
        ("{", "not JSON"),
    ],
)
def test_sampling_parameters_that_cannot_be(parameters: str, names: str) -> None:
    failure = refusal(request(text_input=PROMPT, sampling_parameters=("BYTES", [parameters.encode()])))
    assert names in failure.message
    assert failure.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no input 'text_input'"),
        ({"text_input": ("INT32", [1])}, "send it as BYTES"),
        ({"text_input": ("BYTES", [b"a", b"b"])}, "batches are sent as several requests"),
        ({"text_input": ("BYTES", [b"\xff"])}, "UTF-8"),
        ({"text_input": ("BYTES", [b"a"], [2])}, "shape [2]"),
        ({"text_input": ("BYTES", [b"a"], [-1])}, "shape [-1]"),
        ({"text_input": ("BYTES", [b"a"], [1] * 9)}, "[1] or [1, 1]"),
        ({"text_input": PROMPT, "max_tokens": ("FP32", [3.0])}, "send it as INT32"),
        ({"text_input": PROMPT, "max_tokens": ("INT32", [])}, "'max_tokens' has shape [0]"),
        ({"text_input": PROMPT, "max_tokens": ("INT32", [-3])}, "'max_tokens' is -3"),
        ({"text_input": PROMPT, "stop_words": ("BYTES", [b"x"] * 17)}, "n up to 16"),
        ({"text_input": PROMPT, "beam_width": ("INT32", [17])}, "beam_width is 17, and so many beams are searched"),
        ({"text_input": PROMPT, "beam_width": ("INT32", [0])}, "'beam_width' is 0"),
        ({"text_input": PROMPT, "bad_words": ("BYTES", [b"x"] * 257)}, "n up to 256"),
        ({"text_input": PROMPT, "return_log_probs": ("BOOL", [True])}, "return_log_probs"),
        ({"text_input": PROMPT, "embedding": ("FP32", [1.0])}, "input 'embedding' does not exist"),
        ({"text_input": PROMPT, "stream": ("BOOL", [True]), "exclude_input_in_output": ("BOOL", [False])}, "repeat"),
        ({"text_input": PROMPT, "seed": ("UINT64", [1]), "random_seed": ("UINT64", [2])}, "given twice"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_tensors_that_cannot_be(tensors: dict[str, Any], says: str, raw: bool) -> None:
    failure = refusal(request(raw=raw, **tensors))
    assert says in failure.message
    assert failure.code is Code.INVALID_ARGUMENT


def test_contents_that_do_not_fit_their_shape() -> None:
    message = request(text_input=PROMPT, max_tokens=("INT32", [1]))
    message.inputs[1].contents.int_contents.append(2)
    assert "2 elements" in refusal(message).message
    message = request(raw=True, text_input=PROMPT, max_tokens=("INT32", [1]))
    message.raw_input_contents[1] += b"\0"
    assert "5 bytes" in refusal(message).message
    message.raw_input_contents[1] = message.raw_input_contents[1][:4]
    message.inputs[1].contents.int_contents.append(1)
    assert "contents beside raw_input_contents" in refusal(message).message
    del message.raw_input_contents[1]
    assert "1 raw contents for 2 inputs" in refusal(message).message
    for data in (b"", b"\5\0\0\0Hell", b"\5\0\0\0Hello!", b"\xff\xff\xff\xff"):
        message = request(raw=True, text_input=PROMPT)
        message.raw_input_contents[0] = data
        assert "raw content" in refusal(message).message


def test_names_that_do_not_exist_here() -> None:
    assert refusal(request(text_input=PROMPT, model="other")).code is Code.NOT_FOUND
    message = request(text_input=PROMPT)
    message.model_version = "2"
    assert refusal(message).code is Code.NOT_FOUND
    assert "'logits'" in refusal(request(text_input=PROMPT, outputs=("logits",))).message
    message = request(text_input=PROMPT)
    message.parameters["sequence_id"].int64_param = 4
    assert "sequence_id" in refusal(message).message
    message = request(text_input=PROMPT)
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert "shared memory is not available" in refusal(message).message
    message = request(text_input=PROMPT)
    message.inputs.append(message.inputs[0])
    assert "comes twice" in refusal(message).message


def test_tritons_parameters() -> None:
    message = request(text_input=PROMPT)
    message.parameters["priority"].uint64_param = 3
    message.parameters["timeout"].int64_param = 2_500_000
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    raw = wanted_from_wire(message, (MODEL,)).raw
    assert (raw.priority, raw.deadline_ms) == (-2, 2500), "microseconds, and 1 is the highest"
    message.parameters["timeout"].int64_param = -1
    assert "timeout" in refusal(message).message
    message.parameters["timeout"].string_param = "1"
    assert "string_param" in refusal(message).message


def test_the_last_response_says_so_and_outputs_are_those_asked_for() -> None:
    got = wanted_from_wire(request(text_input=PROMPT, outputs=("text_output", "num_output_tokens")), (MODEL,))
    response = answer_to_wire(
        got,
        model=MODEL,
        client_id="7",
        texts=["é"],
        finish_reasons=["stop"],
        input_tokens=2,
        output_tokens=[3],
        final=True,
    )
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("text_output", "BYTES", [1]),
        ("num_output_tokens", "UINT32", [1]),
    ]
    assert list(response.raw_output_contents) == [b"\2\0\0\0\xc3\xa9", b"\3\0\0\0"]
    assert response.parameters["triton_final_response"].bool_param
    assert (response.id, response.model_version) == ("7", "1")


def test_an_error_of_a_stream_names_its_request_and_its_status() -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, "full; retry later", 250)
    response = error_to_wire(failure, model=MODEL, client_id="7")
    assert response.error_message == "RESOURCE_EXHAUSTED: full; retry later"
    assert response.infer_response.id == "7"
    assert response.infer_response.parameters["retry_after_ms"].int64_param == 250


def test_metadata_lists_all_that_is_taken() -> None:
    metadata = metadata_to_wire(MODEL)
    assert {t.name for t in metadata.inputs} == set(INPUTS)
    assert {t.name for t in metadata.outputs} == set(OUTPUTS)


VALUES = st.one_of(
    st.tuples(st.just("BYTES"), st.lists(st.binary(max_size=8), max_size=3)),
    st.tuples(st.just("INT32"), st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=2)),
    st.tuples(st.just("FP32"), st.lists(st.floats(width=32), max_size=2)),
    st.tuples(st.just("BOOL"), st.lists(st.booleans(), max_size=2)),
    st.tuples(st.just("UINT64"), st.lists(st.integers(0, (1 << 64) - 1), max_size=2)),
)


@given(
    tensors=st.dictionaries(st.sampled_from([*INPUTS, "x"]), VALUES, max_size=6),
    raw=st.booleans(),
    cut=st.integers(0, 3),
)
def test_anything_is_a_request_or_a_refusal(tensors: dict[str, Any], raw: bool, cut: int) -> None:
    message = request(raw=raw, **{"text_input": PROMPT, **tensors})
    if raw and cut:
        message.raw_input_contents[-1] = message.raw_input_contents[-1][:-cut]
    codes = set()
    try:
        wanted_from_wire(message, (MODEL,))
    except RequestRefused as refused:
        codes.add(refused.failure.code)
    assert codes <= {Code.INVALID_ARGUMENT}
