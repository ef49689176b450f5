"""One prompt of text, or a chat, at every door of a router that makes answers of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from diptych.inference import open_inference_pb2
from diptych.v1 import generate_pb2

from tests.support.raw_http import Http

GENERATE = "/diptych.v1.GenerateService/Generate"
INFER = "/inference.GRPCInferenceService/ModelInfer"
CHATS = ("chat completions", "responses", "Generate with a chat")
TEXTS = ("completions", "Generate with text", "ModelInfer")
EVERY = (*CHATS, *TEXTS)


@dataclass(frozen=True, slots=True)
class Answer:
    """`refusal`: the status, the field that is at fault, and the message."""

    text: str = ""
    finish: str = ""
    refusal: tuple[str, str | None, str] | None = None


@dataclass(slots=True)
class Doors:
    http: Http
    channel: grpc.Channel
    model: str

    def ask(self, door: str, text: str, *, max_tokens: int = 16, biases: Mapping[int, float] | None = None) -> Answer:
        """Greedily. `biases`: not at ModelInfer, which has none."""
        if door.startswith("Generate"):
            return self._generate(door, text, max_tokens, biases or {})
        if door == "ModelInfer":
            assert not biases
            return self._infer(text, max_tokens)
        return self._post(door, text, max_tokens, biases or {})

    def _post(self, door: str, text: str, max_tokens: int, biases: Mapping[int, float]) -> Answer:
        sampling = {"model": self.model, "temperature": 0, "logit_bias": {str(t): b for t, b in biases.items()}}
        chat = [{"role": "user", "content": text}]
        path, body = {
            "chat completions": ("/v1/chat/completions", {"messages": chat, "max_tokens": max_tokens}),
            "responses": ("/v1/responses", {"input": text, "max_output_tokens": max_tokens}),
            "completions": ("/v1/completions", {"prompt": text, "max_tokens": max_tokens}),
        }[door]
        found = self.http.post(path, sampling | body)
        if found.status != 200:
            return Answer(refusal=(str(found.status), found.error["param"], found.error["message"]))
        if door == "responses":
            ended = found.json["status"]
            said = "".join(part["text"] for item in found.json["output"] for part in item.get("content", ()))
            return Answer(said, {"completed": "stop", "incomplete": "length"}[ended])
        choice = found.json["choices"][0]
        return Answer(choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"])

    def _generate(self, door: str, text: str, max_tokens: int, biases: Mapping[int, float]) -> Answer:
        sampling = generate_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, logit_bias=biases)
        request = generate_pb2.GenerateRequest(sampling=sampling)
        if door == "Generate with text":
            request.text = text
        else:
            request.chat.messages.add(role="user", content=text)
        call = self.channel.unary_stream(
            GENERATE,
            request_serializer=generate_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generate_pb2.GenerateResponse.FromString,
        )
        try:
            found = list(call(request, timeout=30))
        except grpc.RpcError as error:
            return _refused(error)
        finish = {generate_pb2.FINISH_REASON_STOP: "stop", generate_pb2.FINISH_REASON_LENGTH: "length"}
        return Answer("".join(one.tokens.text for one in found), finish[found[-1].finished.reason])

    def _infer(self, text: str, max_tokens: int) -> Answer:
        request = open_inference_pb2.ModelInferRequest(model_name=self.model)
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
        tensor = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
        tensor.contents.int_contents.append(max_tokens)
        tensor = request.inputs.add(name="temperature", datatype="FP32", shape=[1])
        tensor.contents.fp32_contents.append(0.0)
        return self.infer(request)

    def infer(self, request: open_inference_pb2.ModelInferRequest) -> Answer:
        call = self.channel.unary_unary(
            INFER,
            request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=open_inference_pb2.ModelInferResponse.FromString,
        )
        try:
            found = call(request, timeout=30)
        except grpc.RpcError as error:
            return _refused(error)
        said = {
            tensor.name: raw[4:].decode()
            for tensor, raw in zip(found.outputs, found.raw_output_contents, strict=True)
            if tensor.datatype == "BYTES"
        }
        return Answer(said["text_output"], said["finish_reason"])


def _refused(error: Any) -> Answer:
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    status, named = rpc_status.from_call(error), None
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad) and bad.field_violations:
            named = bad.field_violations[0].field
    return Answer(refusal=(error.code().name, named, error.details() or ""))
