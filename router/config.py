"""The `router:` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class HttpConfig(BaseModel):
    """Limits of the HTTP port."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: int = Field(default=8192, ge=1, description="More are answered with 503 and closed.")
    max_header_bytes: int = Field(default=32 << 10, ge=1024, description="Request line and headers together.")
    read_timeout_s: float = Field(default=60.0, gt=0, description="Within this a request has arrived whole.")
    keep_alive_s: int = Field(default=75, ge=1, description="How long an idle connection is kept.")
    write_timeout_s: float = Field(
        default=120.0, gt=0, description="A connection that takes no byte for so long is closed."
    )
    cors_origins: list[str] = Field(
        default_factory=list, description='Origins whose pages may call from a browser; ["*"] is any, none is off.'
    )


class RouterConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="embedded", description="Where tokenizer and configuration of the served model are.")
    served_model_name: str = Field(
        default="", description="Name that requests use; empty = the model's last path part."
    )
    served_model_names: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=64, description="Further names that requests may use for the same model."
    )
    router_id: str = Field(default="", description="Stable name; empty = host and port.")
    host: str = Field(default="127.0.0.1", description="Address of the public port; loopback unless told otherwise.")
    grpc_port: int = Field(default=8100, ge=0, le=65535)
    http_port: int | None = Field(
        default=8000, ge=0, le=65535, description="OpenAI-compatible HTTP, on `host`; null = none."
    )
    http: HttpConfig = HttpConfig()
    internal_host: str = Field(default="127.0.0.1", description="Address of the port where workers register.")
    internal_port: int = Field(default=8101, ge=0, le=65535)
    default_deadline_s: float = Field(default=300.0, gt=0, description="For requests that name none.")
    max_deadline_s: float = Field(default=3600.0, gt=0, le=4e6)
    default_max_tokens: int = Field(default=256, ge=1)
    generation_config: Literal["model", "ours"] = Field(
        default="model",
        description="Sampling that requests leave out: as the model's generation_config.json has it (temperature, "
        "top_p, top_k, min_p, repetition_penalty; its max_new_tokens is a limit for all), or our own defaults.",
    )
    max_live_requests: int = Field(default=4096, ge=1)
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "pythonic", "deepseek_v3"] = Field(
        default="auto", description="How the model writes tool calls; auto = by its chat template."
    )
    max_prompt_bytes: int = Field(default=8 << 20, ge=1, description="Longest prompt in bytes of text.")
    max_lag_tokens: int = Field(
        default=16384, ge=1, description="Tokens that a client may leave unread before it is cut off."
    )
    itl_target_ms: float = Field(
        default=100.0, gt=0, description="Inter-token latency that running answers should keep."
    )
    max_local_stall_steps: float = Field(
        default=2.0,
        ge=0,
        description="A prompt whose computation takes at most so many ITL targets runs on decode alone.",
    )
    ttft_target_ms: float = Field(
        default=1000.0, ge=0, description="A first token is due after this and `ttft_target_stretch` prompt times."
    )
    ttft_target_stretch: float = Field(
        default=2.0, ge=0, description="Times that the prompt takes on an idle worker, added to `ttft_target_ms`."
    )
    overload: Literal["put_back", "arrival"] = Field(
        default="put_back",
        description="put_back: prompts by due date, and when not all can be in time the longest wait until there is "
        "time; arrival: first come, first served.",
    )
    hysteresis: float = Field(
        default=0.05, ge=0, le=1, description="How much cheaper another placement must be than the one chosen last."
    )
    pull_prefixes: bool = Field(
        default=True,
        description="Pull a cached prefix from another worker instead of computing it, where that is quicker.",
    )
    max_attempts: int = Field(default=4, ge=1, description="How often one request may be placed, moves included.")
    recovery_wait_s: float = Field(
        default=5.0, ge=0, description="How long a request that lost its worker waits for another to appear."
    )
    retry_share: float = Field(
        default=0.2, ge=0, description="Moves beyond each request's first, as a share of all requests."
    )
    retry_burst: float = Field(default=100.0, ge=1, description="Such moves that may be saved up.")
    max_backlog_s: float = Field(
        default=60.0, gt=0, description="Requests of priority 0 or lower are refused when no worker could start sooner."
    )
    heartbeat_s: float = Field(default=1.0, gt=0, le=3600, description="How often workers say that they are there.")
    forget_after_s: float = Field(
        default=5.0, gt=0, description="A lost worker without heartbeat is forgotten after this."
    )
    drain_s: float = Field(
        default=30.0, gt=0, le=1e6, description="How long live requests may go on when the router leaves."
    )
