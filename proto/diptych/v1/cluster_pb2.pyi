from diptych.v1 import generate_pb2 as _generate_pb2
from diptych.v1 import scaling_pb2 as _scaling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_STANDBY: _ClassVar[Role]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_CONNECTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_LOST: _ClassVar[WorkerState]

class PathState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATH_STATE_UNSPECIFIED: _ClassVar[PathState]
    PATH_STATE_UNPROVEN: _ClassVar[PathState]
    PATH_STATE_OK: _ClassVar[PathState]
    PATH_STATE_BROKEN: _ClassVar[PathState]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_STANDBY: Role
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_CONNECTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_LOST: WorkerState
PATH_STATE_UNSPECIFIED: PathState
PATH_STATE_UNPROVEN: PathState
PATH_STATE_OK: PathState
PATH_STATE_BROKEN: PathState

class Path(_message.Message):
    __slots__ = ("source_worker", "source_epoch", "state", "probe_ms", "failures", "detail")
    SOURCE_WORKER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBE_MS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    source_worker: str
    source_epoch: int
    state: PathState
    probe_ms: float
    failures: int
    detail: str
    def __init__(self, source_worker: _Optional[str] = ..., source_epoch: _Optional[int] = ..., state: _Optional[_Union[PathState, str]] = ..., probe_ms: _Optional[float] = ..., failures: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running_sequences", "waiting_sequences", "prefill_backlog_tokens", "context_tokens", "total_blocks", "free_blocks", "cached_blocks", "leased_blocks", "quarantined_blocks", "step_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "pull_bytes_per_s", "tokens_total", "preemptions_total", "handoffs_total", "handoff_failures_total", "active_leases", "paths", "waiting_blocks", "last_sequence_id", "chunk_tokens", "decode_step_ms", "prompt_tokens_total", "cached_tokens_total", "prefix_pulls_total", "prefix_pull_failures_total", "input_busy_s", "output_busy_s", "step_constant_ms", "step_per_sequence_ms", "step_per_token_ms", "step_per_context_token_ms", "step_per_attention_pair_ms", "step_cost_error", "put_back_sequences", "put_back_tokens", "blocks_in_use", "verifications_total", "drafts_total", "drafts_accepted_total", "loaded_adapters", "adapter_load_ms")
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BACKLOG_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PULL_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FAILURES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LEASES_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    WAITING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PULLS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PULL_FAILURES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    INPUT_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    STEP_CONSTANT_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_SEQUENCE_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_CONTEXT_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_PER_ATTENTION_PAIR_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_ERROR_FIELD_NUMBER: _ClassVar[int]
    PUT_BACK_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PUT_BACK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    VERIFICATIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_ACCEPTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOADED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    running_sequences: int
    waiting_sequences: int
    prefill_backlog_tokens: int
    context_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    leased_blocks: int
    quarantined_blocks: int
    step_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    pull_bytes_per_s: float
    tokens_total: int
    preemptions_total: int
    handoffs_total: int
    handoff_failures_total: int
    active_leases: int
    paths: _containers.RepeatedCompositeFieldContainer[Path]
    waiting_blocks: int
    last_sequence_id: int
    chunk_tokens: int
    decode_step_ms: float
    prompt_tokens_total: int
    cached_tokens_total: int
    prefix_pulls_total: int
    prefix_pull_failures_total: int
    input_busy_s: float
    output_busy_s: float
    step_constant_ms: float
    step_per_sequence_ms: float
    step_per_token_ms: float
    step_per_context_token_ms: float
    step_per_attention_pair_ms: float
    step_cost_error: float
    put_back_sequences: int
    put_back_tokens: int
    blocks_in_use: int
    verifications_total: int
    drafts_total: int
    drafts_accepted_total: int
    loaded_adapters: _containers.RepeatedScalarFieldContainer[str]
    adapter_load_ms: float
    def __init__(self, running_sequences: _Optional[int] = ..., waiting_sequences: _Optional[int] = ..., prefill_backlog_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., step_ms: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_tokens_per_s: _Optional[float] = ..., pull_bytes_per_s: _Optional[float] = ..., tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., handoffs_total: _Optional[int] = ..., handoff_failures_total: _Optional[int] = ..., active_leases: _Optional[int] = ..., paths: _Optional[_Iterable[_Union[Path, _Mapping]]] = ..., waiting_blocks: _Optional[int] = ..., last_sequence_id: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., decode_step_ms: _Optional[float] = ..., prompt_tokens_total: _Optional[int] = ..., cached_tokens_total: _Optional[int] = ..., prefix_pulls_total: _Optional[int] = ..., prefix_pull_failures_total: _Optional[int] = ..., input_busy_s: _Optional[float] = ..., output_busy_s: _Optional[float] = ..., step_constant_ms: _Optional[float] = ..., step_per_sequence_ms: _Optional[float] = ..., step_per_token_ms: _Optional[float] = ..., step_per_context_token_ms: _Optional[float] = ..., step_per_attention_pair_ms: _Optional[float] = ..., step_cost_error: _Optional[float] = ..., put_back_sequences: _Optional[int] = ..., put_back_tokens: _Optional[int] = ..., blocks_in_use: _Optional[int] = ..., verifications_total: _Optional[int] = ..., drafts_total: _Optional[int] = ..., drafts_accepted_total: _Optional[int] = ..., loaded_adapters: _Optional[_Iterable[str]] = ..., adapter_load_ms: _Optional[float] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("worker_id", "role", "epoch", "address", "state", "load", "transport", "attention_backend", "device", "report_age_ms", "dispatched_requests", "trial", "listeners", "metrics_address", "group", "revision")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: Role
    epoch: int
    address: str
    state: WorkerState
    load: WorkerLoad
    transport: str
    attention_backend: str
    device: str
    report_age_ms: float
    dispatched_requests: int
    trial: str
    listeners: _containers.RepeatedCompositeFieldContainer[Listener]
    metrics_address: str
    group: str
    revision: str
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., transport: _Optional[str] = ..., attention_backend: _Optional[str] = ..., device: _Optional[str] = ..., report_age_ms: _Optional[float] = ..., dispatched_requests: _Optional[int] = ..., trial: _Optional[str] = ..., listeners: _Optional[_Iterable[_Union[Listener, _Mapping]]] = ..., metrics_address: _Optional[str] = ..., group: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class Listener(_message.Message):
    __slots__ = ("address", "protocol", "authentication", "encrypted")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    AUTHENTICATION_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    address: str
    protocol: str
    authentication: str
    encrypted: bool
    def __init__(self, address: _Optional[str] = ..., protocol: _Optional[str] = ..., authentication: _Optional[str] = ..., encrypted: _Optional[bool] = ...) -> None: ...

class RecentRequest(_message.Message):
    __slots__ = ("request_id", "route", "prompt_tokens", "completion_tokens", "timings", "outcome", "cached_tokens", "recoveries", "age_ms", "migrations", "speculation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    route: _generate_pb2.Route
    prompt_tokens: int
    completion_tokens: int
    timings: _generate_pb2.Timings
    outcome: str
    cached_tokens: int
    recoveries: int
    age_ms: float
    migrations: int
    speculation: _generate_pb2.Speculation
    def __init__(self, request_id: _Optional[str] = ..., route: _Optional[_Union[_generate_pb2.Route, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., timings: _Optional[_Union[_generate_pb2.Timings, _Mapping]] = ..., outcome: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., recoveries: _Optional[int] = ..., age_ms: _Optional[float] = ..., migrations: _Optional[int] = ..., speculation: _Optional[_Union[_generate_pb2.Speculation, _Mapping]] = ...) -> None: ...

class Migration(_message.Message):
    __slots__ = ("request_id", "source_worker", "target_worker", "reason", "outcome", "pause_ms", "pulled_bytes", "age_ms", "took_ms", "frozen_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_FIELD_NUMBER: _ClassVar[int]
    TARGET_WORKER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PAUSE_MS_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    TOOK_MS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    source_worker: str
    target_worker: str
    reason: str
    outcome: str
    pause_ms: float
    pulled_bytes: int
    age_ms: float
    took_ms: float
    frozen_ms: float
    def __init__(self, request_id: _Optional[str] = ..., source_worker: _Optional[str] = ..., target_worker: _Optional[str] = ..., reason: _Optional[str] = ..., outcome: _Optional[str] = ..., pause_ms: _Optional[float] = ..., pulled_bytes: _Optional[int] = ..., age_ms: _Optional[float] = ..., took_ms: _Optional[float] = ..., frozen_ms: _Optional[float] = ...) -> None: ...

class RouterState(_message.Message):
    __slots__ = ("router_id", "model", "live_requests", "requests_total", "errors_total", "tokens_total", "uptime_s", "serving", "not_serving_reason", "context_limit_tokens", "recoveries_total", "retries_total", "listeners", "refused_total", "metrics_address", "mixed_quantization", "other_routers")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERRORS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    NOT_SERVING_REASON_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LIMIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RETRIES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MIXED_QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    model: str
    live_requests: int
    requests_total: int
    errors_total: int
    tokens_total: int
    uptime_s: float
    serving: bool
    not_serving_reason: str
    context_limit_tokens: int
    recoveries_total: int
    retries_total: int
    listeners: _containers.RepeatedCompositeFieldContainer[Listener]
    refused_total: int
    metrics_address: str
    mixed_quantization: bool
    other_routers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, router_id: _Optional[str] = ..., model: _Optional[str] = ..., live_requests: _Optional[int] = ..., requests_total: _Optional[int] = ..., errors_total: _Optional[int] = ..., tokens_total: _Optional[int] = ..., uptime_s: _Optional[float] = ..., serving: _Optional[bool] = ..., not_serving_reason: _Optional[str] = ..., context_limit_tokens: _Optional[int] = ..., recoveries_total: _Optional[int] = ..., retries_total: _Optional[int] = ..., listeners: _Optional[_Iterable[_Union[Listener, _Mapping]]] = ..., refused_total: _Optional[int] = ..., metrics_address: _Optional[str] = ..., mixed_quantization: _Optional[bool] = ..., other_routers: _Optional[_Iterable[str]] = ...) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("router", "workers", "recent", "migrations", "wish")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    WISH_FIELD_NUMBER: _ClassVar[int]
    router: RouterState
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    recent: _containers.RepeatedCompositeFieldContainer[RecentRequest]
    migrations: _containers.RepeatedCompositeFieldContainer[Migration]
    wish: ScaleWish
    def __init__(self, router: _Optional[_Union[RouterState, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ..., recent: _Optional[_Iterable[_Union[RecentRequest, _Mapping]]] = ..., migrations: _Optional[_Iterable[_Union[Migration, _Mapping]]] = ..., wish: _Optional[_Union[ScaleWish, _Mapping]] = ...) -> None: ...

class ScaleWish(_message.Message):
    __slots__ = ("number", "age_ms", "prefill", "decode")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    number: int
    age_ms: float
    prefill: int
    decode: int
    def __init__(self, number: _Optional[int] = ..., age_ms: _Optional[float] = ..., prefill: _Optional[int] = ..., decode: _Optional[int] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("cluster",)
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    cluster: Cluster
    def __init__(self, cluster: _Optional[_Union[Cluster, _Mapping]] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("cluster",)
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    cluster: Cluster
    def __init__(self, cluster: _Optional[_Union[Cluster, _Mapping]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanation",)
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class AlternativeRoute(_message.Message):
    __slots__ = ("placement", "decode_worker", "prefill_worker", "ttft_ms", "cost_ms")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    COST_MS_FIELD_NUMBER: _ClassVar[int]
    placement: _generate_pb2.Placement
    decode_worker: str
    prefill_worker: str
    ttft_ms: float
    cost_ms: float
    def __init__(self, placement: _Optional[_Union[_generate_pb2.Placement, str]] = ..., decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., ttft_ms: _Optional[float] = ..., cost_ms: _Optional[float] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("name", "predicted_ms", "actual_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    predicted_ms: float
    actual_ms: float
    def __init__(self, name: _Optional[str] = ..., predicted_ms: _Optional[float] = ..., actual_ms: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("route", "cost_ms", "alternatives", "prefix_holder", "prefix_tokens")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    COST_MS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HOLDER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    route: _generate_pb2.Route
    cost_ms: float
    alternatives: _containers.RepeatedCompositeFieldContainer[AlternativeRoute]
    prefix_holder: str
    prefix_tokens: int
    def __init__(self, route: _Optional[_Union[_generate_pb2.Route, _Mapping]] = ..., cost_ms: _Optional[float] = ..., alternatives: _Optional[_Iterable[_Union[AlternativeRoute, _Mapping]]] = ..., prefix_holder: _Optional[str] = ..., prefix_tokens: _Optional[int] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request", "decisions", "predictions", "migrations")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    request: RecentRequest
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    migrations: _containers.RepeatedCompositeFieldContainer[Migration]
    def __init__(self, request: _Optional[_Union[RecentRequest, _Mapping]] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ..., migrations: _Optional[_Iterable[_Union[Migration, _Mapping]]] = ...) -> None: ...

class GetScalingRequest(_message.Message):
    __slots__ = ("last", "changes_only")
    LAST_FIELD_NUMBER: _ClassVar[int]
    CHANGES_ONLY_FIELD_NUMBER: _ClassVar[int]
    last: int
    changes_only: bool
    def __init__(self, last: _Optional[int] = ..., changes_only: _Optional[bool] = ...) -> None: ...

class GetScalingResponse(_message.Message):
    __slots__ = ("decisions", "points", "decisions_total", "errors_total", "current")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERRORS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[_scaling_pb2.ScalingDecision]
    points: _containers.RepeatedCompositeFieldContainer[_scaling_pb2.ScalingPoint]
    decisions_total: int
    errors_total: int
    current: _scaling_pb2.ScalingDecision
    def __init__(self, decisions: _Optional[_Iterable[_Union[_scaling_pb2.ScalingDecision, _Mapping]]] = ..., points: _Optional[_Iterable[_Union[_scaling_pb2.ScalingPoint, _Mapping]]] = ..., decisions_total: _Optional[int] = ..., errors_total: _Optional[int] = ..., current: _Optional[_Union[_scaling_pb2.ScalingDecision, _Mapping]] = ...) -> None: ...
