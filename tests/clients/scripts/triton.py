"""tritonclient against GRPCInferenceService: python triton.py TARGET MODEL PROMPT MAX_TOKENS. Prints what it saw."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from importlib.metadata import version

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

TARGET, MODEL, PROMPT, MAX_TOKENS = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])


def tensor(name, values, dtype):
    array = np.array(values, dtype=dtype)
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def inputs(prompt=PROMPT, stream=False, **more):
    made = [
        tensor("text_input", [prompt.encode()], object),
        tensor("stream", [stream], bool),
        tensor("max_tokens", [MAX_TOKENS], np.int32),
    ]
    return made + [tensor(name, values, dtype) for name, (values, dtype) in more.items()]


def error_of(call):
    try:
        call()
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return None


def streamed(client, requests, cancel_after=None):
    """Responses by request id, in the order of their arrival; errors beside them."""
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for request_id, tensors in requests.items():
        client.async_stream_infer(MODEL, tensors, request_id=request_id, enable_empty_final_response=True)
    seen, errors, open_requests = {}, [], set(requests)
    while open_requests:
        result, error = answers.get(timeout=60)
        if error is not None:
            errors.append(error.message())
            open_requests.pop()
            continue
        response = result.get_response()
        text = result.as_numpy("text_output")[0].decode()
        final = response.parameters["triton_final_response"].bool_param
        reason = result.as_numpy("finish_reason")[0].decode()
        seen.setdefault(response.id, []).append([text, final, reason])
        if final:
            open_requests.discard(response.id)
        if cancel_after is not None and len(seen[response.id]) >= cancel_after:
            break
    client.stop_stream(cancel_requests=cancel_after is not None)
    return {"answers": seen, "errors": errors}


async def aio_stream():
    async with triton_aio.InferenceServerClient(TARGET) as client:

        async def requests():
            yield {"model_name": MODEL, "inputs": inputs(stream=True), "request_id": "a"}

        text, final = "", False
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            text += result.as_numpy("text_output")[0].decode()
            final = result.get_response().parameters["triton_final_response"].bool_param
        return [text, final]


def main():
    client = triton.InferenceServerClient(TARGET)
    plain = client.infer(MODEL, inputs())
    metadata = client.get_model_metadata(MODEL)
    json_sampling = json.dumps({"max_tokens": MAX_TOKENS, "temperature": "0"}).encode()
    seen = {
        "version": version("tritonclient"),
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready(MODEL), client.is_model_ready("other")],
        "server": client.get_server_metadata().name,
        "inputs": [t.name for t in metadata.inputs],
        "plain": [plain.as_numpy("text_output")[0].decode(), plain.as_numpy("finish_reason")[0].decode()],
        "vllm_names": client.infer(
            MODEL,
            [tensor("text_input", [PROMPT.encode()], object), tensor("sampling_parameters", [json_sampling], object)],
        )
        .as_numpy("text_output")[0]
        .decode(),
        "with_prompt": client.infer(MODEL, inputs(exclude_input_in_output=([False], bool)))
        .as_numpy("text_output")[0]
        .decode(),
        "streams": streamed(client, {str(i): inputs(stream=True) for i in range(4)}),
        "one_bad": streamed(client, {"bad": inputs(stream=True, beam_width=([40], np.int32))}),
        "unstreamed": streamed(client, {"whole": inputs(stream=False)}),
        "cancelled": len(streamed(client, {"c": inputs(stream=True)}, cancel_after=2)["answers"]["c"]),
        "aio": asyncio.run(aio_stream()),
        "errors": {
            "model": error_of(lambda: client.infer("other", inputs())),
            "beams": error_of(lambda: client.infer(MODEL, inputs(beam_width=([40], np.int32)))),
            "stream": error_of(lambda: client.infer(MODEL, inputs(stream=True))),
            "dtype": error_of(lambda: client.infer(MODEL, inputs(temperature=([1], np.int32)))),
            "timeout": error_of(lambda: client.infer(MODEL, inputs(), timeout=1000)),
        },
    }
    client.close()
    print(json.dumps(seen))


main()
