"""The `router:` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class HttpConfig(BaseModel):
    """Limits of the HTTP port."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: int = Field(
        default=8192, ge=1, description="Further connections are answered with 503 and closed."
    )
    max_header_bytes: int = Field(default=32 << 10, ge=1024, description="Size of request line and headers together.")
    read_timeout_s: float = Field(default=60.0, gt=0, description="Time within which a whole request must arrive.")
    keep_alive_s: int = Field(default=75, ge=1, description="How long an idle connection is kept.")
    write_timeout_s: float = Field(
        default=120.0, gt=0, description="A connection whose client reads nothing for this long is closed."
    )
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="Names beside loopback's that a request's Host may have, on a loopback port without API keys.",
    )
    cors_origins: list[str] = Field(
        default_factory=list, description='Origins whose pages may call from a browser; ["*"] = any, empty = none.'
    )


class RouterConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="embedded", description="Directory or hub id of the served model, for its tokenizer and configuration."
    )
    served_model_name: str = Field(
        default="", description="Name of the model in requests; empty = last part of the model's path."
    )
    served_model_names: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=64, description="Further names that requests may use for the same model."
    )
    router_id: str = Field(default="", description="Stable name; empty = host and port.")
    replicas: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Routers of the cluster. On one machine the second has ports ten higher, and so on; free ones if "
        "these are taken.",
    )
    host: str = Field(default="127.0.0.1", description="Address of the public ports; loopback by default.")
    grpc_port: int = Field(default=8100, ge=0, le=65535)
    http_port: int | None = Field(
        default=8000, ge=0, le=65535, description="OpenAI-compatible HTTP, on `host`; null = none."
    )
    http: HttpConfig = HttpConfig()
    internal_host: str = Field(default="127.0.0.1", description="Address of the port where workers register.")
    internal_port: int = Field(default=8101, ge=0, le=65535)
    default_deadline_s: float = Field(default=300.0, gt=0, description="Deadline of requests that set none.")
    max_deadline_s: float = Field(default=3600.0, gt=0, le=4e6)
    default_max_tokens: int = Field(default=256, ge=1)
    generation_config: Literal["model", "ours"] = Field(
        default="model",
        description="Where sampling parameters come from that a request leaves out: the model's generation_config.json "
        "(temperature, top_p, top_k, min_p, repetition_penalty; its max_new_tokens limits all), or our own defaults.",
    )
    max_live_requests: int = Field(default=4096, ge=1)
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "pythonic", "deepseek_v3"] = Field(
        default="auto", description="Format of the model's tool calls; auto = detected from its chat template."
    )
    chat_control_tokens: bool = Field(
        default=False,
        description="Whether control tokens spelled out in a chat's texts are encoded as such; false = as plain text.",
    )
    max_prompt_bytes: int = Field(default=8 << 20, ge=1, description="Longest prompt, in bytes of text.")
    max_lag_tokens: int = Field(
        default=16384, ge=1, description="Tokens that a client may leave unread before it is cut off."
    )
    itl_target_ms: float = Field(
        default=100.0, gt=0, description="Target for the inter-token latency of running answers."
    )
    max_local_stall_steps: float = Field(
        default=2.0,
        ge=0,
        description="A prompt that takes at most this many ITL targets to compute runs on decode alone.",
    )
    ttft_target_ms: float = Field(
        default=1000.0,
        ge=0,
        description="A first token is due after this time plus `ttft_target_stretch` prompt times.",
    )
    ttft_target_stretch: float = Field(
        default=2.0, ge=0, description="Multiple of the prompt's time on an idle worker, added to `ttft_target_ms`."
    )
    migrate: bool = Field(
        default=True,
        description="Whether running answers go on elsewhere when their worker leaves, switches or is short of KV; "
        "false = a worker that leaves waits for them.",
    )
    balance: bool = Field(
        default=False,
        description="Whether running answers also leave a decode worker whose steps take much longer than another's; "
        "needs `migrate`.",
    )
    overload: Literal["put_back", "arrival"] = Field(
        default="put_back",
        description="put_back: prompts run by due date; if not all can be in time, some wait until there is time. "
        "arrival: first come, first served.",
    )
    overload_protect: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Who waits under `overload: put_back`. 0: the longest prompts, which keeps the most in time. 1: "
        "drawn by lot, however long. Between: both count.",
    )
    hysteresis: float = Field(
        default=0.05, ge=0, le=1, description="How much cheaper another placement must be than the one chosen last."
    )
    pull_prefixes: bool = Field(
        default=True,
        description="Pull a cached prefix from another worker instead of computing it, if that is faster.",
    )
    other_weights: Literal["refuse", "beside"] = Field(
        default="refuse",
        description="A worker with other weights than those that serve: refused, or taken for an upgrade. Each answer "
        "comes from one of the two.",
    )
    mixed_quantization: bool = Field(
        default=False,
        description="Workers of one checkpoint serve together although their engine.quantization differs: prompts in "
        "bfloat16 and answers in int4, for example. Answers that several schemes computed are no longer those of any "
        "one engine, and say so. docs/quantization.md.",
    )
    max_attempts: int = Field(default=4, ge=1, description="How often one request may be placed, including moves.")
    recovery_wait_s: float = Field(
        default=5.0, ge=0, description="How long a request that lost its worker waits for another to appear."
    )
    retry_share: float = Field(
        default=0.2, ge=0, description="Moves beyond each request's first, as a share of all requests."
    )
    retry_burst: float = Field(default=100.0, ge=1, description="How many such moves may be saved up for a burst.")
    max_backlog_s: float = Field(
        default=60.0,
        gt=0,
        description="Requests of priority 0 or lower are refused if no worker could start them within this time.",
    )
    heartbeat_s: float = Field(default=1.0, gt=0, le=3600, description="How often workers send a heartbeat.")
    forget_after_s: float = Field(
        default=5.0, gt=0, description="A lost worker without heartbeat is forgotten after this time."
    )
    drain_s: float = Field(
        default=30.0, gt=0, le=1e6, description="How long live requests may continue when the router drains."
    )
