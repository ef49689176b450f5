"""inference.* messages <-> tensors, requests and answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diptych.inference import open_inference_pb2 as pb

from router.doors.open_inference.request import INPUTS, OUTPUTS, TensorSpec, Wanted, wanted_from
from router.doors.open_inference.tensors import (
    bytes_to_raw,
    check_declared,
    count_to_raw,
    from_contents,
    from_raw,
    invalid,
    shown,
)
from router.errors import Code, Failure, refuse

VERSION = "1"  # of the served model; this protocol wants one
PLATFORM = "diptych"
FINAL = "triton_final_response"
_MAX_TENSORS = 64
# Parameters that Triton's clients add by themselves; the others of a request are refused.
_PARAMETERS = {
    "priority": ("uint64_param", "int64_param"),
    "timeout": ("int64_param", "uint64_param"),
    "triton_enable_empty_final_response": ("bool_param",),  # our last response always carries the parameter
}


def check_model(name: str, version: str, served: Sequence[str]) -> None:
    """Raises RequestRefused (NOT_FOUND)."""
    if name not in served:
        known = " or ".join(map(repr, served))
        raise refuse(Code.NOT_FOUND, f"model {shown(name)} is not served here; served is {known}", field="name")
    if version not in ("", VERSION):
        raise refuse(
            Code.NOT_FOUND,
            f"model {name!r} has no version {shown(version)}; use {VERSION!r}, or leave it empty",
            field="version",
        )


def wanted_from_wire(m: pb.ModelInferRequest, served: Sequence[str]) -> Wanted:
    """Raises RequestRefused: every tensor and parameter is understood, or named in the refusal."""
    check_model(m.model_name, m.model_version, served)
    if len(m.inputs) > _MAX_TENSORS or len(m.outputs) > _MAX_TENSORS:
        raise invalid("inputs", f"{len(m.inputs)} inputs and {len(m.outputs)} outputs; send at most {_MAX_TENSORS}")
    parameters = _parameters(m.parameters)
    for output in m.outputs:
        for name in output.parameters:
            raise invalid("outputs", f"output {shown(output.name)} has parameter {shown(name)}; leave it out")
    return wanted_from(
        _inputs(m),
        [output.name for output in m.outputs],
        model=m.model_name,
        priority=parameters.get("priority", 0),
        timeout_us=parameters.get("timeout", 0),
    )


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in parameters.items():
        if name not in _PARAMETERS:
            raise invalid(
                "parameters", f"parameter {shown(name)} does not exist here; known are {', '.join(_PARAMETERS)}"
            )
        kind = parameter.WhichOneof("parameter_choice")
        if kind not in _PARAMETERS[name]:
            raise invalid("parameters", f"parameter {name!r} comes as {kind}; send {_PARAMETERS[name][0]}")
        found[name] = getattr(parameter, kind)
    return found


def _inputs(m: pb.ModelInferRequest) -> dict[str, list[Any]]:
    raw = m.raw_input_contents
    if raw and len(raw) != len(m.inputs):
        raise invalid(
            "raw_input_contents",
            f"{len(raw)} raw contents for {len(m.inputs)} inputs; send one for each, in their order, or none",
        )
    values: dict[str, list[Any]] = {}
    for i, tensor in enumerate(m.inputs):
        name = tensor.name
        if name not in INPUTS:
            raise invalid("inputs", f"input {shown(name)} does not exist; known are {', '.join(INPUTS)}")
        if name in values:
            raise invalid(name, f"input {name!r} comes twice; send it once")
        for parameter in tensor.parameters:
            hint = " (shared memory is not available: send the content)" if "shared_memory" in parameter else ""
            raise invalid(name, f"input {name!r} has parameter {shown(parameter)}; leave it out{hint}")
        count = check_declared(name, tensor.datatype, tensor.shape, INPUTS[name])
        if raw and tensor.HasField("contents"):
            raise invalid(name, f"input {name!r} has contents beside raw_input_contents; send one of them")
        if raw:
            values[name] = from_raw(name, tensor.datatype, count, raw[i])
        else:
            values[name] = from_contents(name, tensor.datatype, count, tensor.contents)
    return values


def answer_to_wire(
    wanted: Wanted,
    *,
    model: str,
    client_id: str,
    texts: Sequence[str],
    finish_reasons: Sequence[str],
    input_tokens: int,
    output_tokens: Sequence[int],
    final: bool,
) -> pb.ModelInferResponse:
    """An element for each answer. `output_tokens`: so far. Finish reasons are empty until the last response."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=client_id)
    response.parameters[FINAL].bool_param = final
    for name in wanted.outputs:
        count = 1 if name == "num_input_tokens" else len(texts)
        response.outputs.add(name=name, datatype=OUTPUTS[name].datatype, shape=[count])
        match name:
            case "text_output":
                raw = b"".join(map(bytes_to_raw, texts))
            case "finish_reason":
                raw = b"".join(map(bytes_to_raw, finish_reasons))
            case "num_input_tokens":
                raw = count_to_raw(input_tokens)
            case _:
                raw = b"".join(map(count_to_raw, output_tokens))
        response.raw_output_contents.append(raw)
    return response


def error_to_wire(failure: Failure, *, model: str, client_id: str) -> pb.ModelStreamInferResponse:
    """One request of a stream has failed. The protocol has no place for a status code: it leads the message."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=client_id)
    response.parameters[FINAL].bool_param = True
    if failure.retry_after_ms:
        response.parameters["retry_after_ms"].int64_param = failure.retry_after_ms
    return pb.ModelStreamInferResponse(error_message=f"{failure.code.name}: {failure.message}", infer_response=response)


def metadata_to_wire(model: str) -> pb.ModelMetadataResponse:
    return pb.ModelMetadataResponse(
        name=model, versions=[VERSION], platform=PLATFORM, inputs=_tensors(INPUTS), outputs=_tensors(OUTPUTS)
    )


def _tensors(specs: Mapping[str, TensorSpec]) -> Iterable[pb.ModelMetadataResponse.TensorMetadata]:
    for name, spec in specs.items():
        shape = [1] if spec.elements == 1 else [-1]
        yield pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=spec.datatype, shape=shape)
