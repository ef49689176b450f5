"""StructuredOutput of generate.proto <-> Structured."""

from __future__ import annotations

from diptych.v1 import generate_pb2

from grammar.structured import Kind, Structured


def structured_from_wire(m: generate_pb2.StructuredOutput) -> Structured | None:
    """None: it names no format."""
    match m.WhichOneof("format"):
        case "choice":
            return Structured(Kind.CHOICE, options=tuple(m.choice.options))
        case "json_object" if m.json_object:
            return Structured(Kind.JSON_OBJECT)
        case "json_schema" | "regex" | "lark" as kind:
            return Structured(Kind(kind), getattr(m, kind))
    return None


def structured_to_wire(structured: Structured) -> generate_pb2.StructuredOutput:
    match structured.kind:
        case Kind.CHOICE:
            return generate_pb2.StructuredOutput(choice=generate_pb2.Choice(options=structured.options))
        case Kind.JSON_OBJECT:
            return generate_pb2.StructuredOutput(json_object=True)
        case Kind.JSON_SCHEMA:
            return generate_pb2.StructuredOutput(json_schema=structured.text)
        case Kind.REGEX:
            return generate_pb2.StructuredOutput(regex=structured.text)
        case Kind.LARK:
            return generate_pb2.StructuredOutput(lark=structured.text)
