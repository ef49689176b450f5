from diptych.v1 import cluster_pb2 as _cluster_pb2
from diptych.v1 import generate_pb2 as _generate_pb2
from diptych.v1 import handoff_pb2 as _handoff_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "address", "model", "layout_fingerprint", "block_tokens", "total_blocks", "context_limit_tokens", "vocab_size", "transport", "attention_backend", "device", "leaving", "block_bytes", "listeners", "metrics_address", "fixed_bytes", "model_identity", "trial", "role_changes", "original_context_tokens", "dtype", "routers", "protocol", "oldest_protocol", "kept_tokens", "group", "masks_tokens", "scores_prompts", "adapters", "searches_beams", "unquantized_identity", "pairing_fingerprint", "weights", "adapters_said")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LIMIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIXED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGES_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MASKS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    SEARCHES_BEAMS_FIELD_NUMBER: _ClassVar[int]
    UNQUANTIZED_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PAIRING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_SAID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: _cluster_pb2.Role
    address: str
    model: str
    layout_fingerprint: str
    block_tokens: int
    total_blocks: int
    context_limit_tokens: int
    vocab_size: int
    transport: str
    attention_backend: str
    device: str
    leaving: bool
    block_bytes: int
    listeners: _containers.RepeatedCompositeFieldContainer[_cluster_pb2.Listener]
    metrics_address: str
    fixed_bytes: int
    model_identity: str
    trial: str
    role_changes: int
    original_context_tokens: int
    dtype: str
    routers: _containers.RepeatedScalarFieldContainer[str]
    protocol: int
    oldest_protocol: int
    kept_tokens: int
    group: str
    masks_tokens: bool
    scores_prompts: bool
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    searches_beams: bool
    unquantized_identity: str
    pairing_fingerprint: str
    weights: str
    adapters_said: AdaptersSaid
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., block_tokens: _Optional[int] = ..., total_blocks: _Optional[int] = ..., context_limit_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., transport: _Optional[str] = ..., attention_backend: _Optional[str] = ..., device: _Optional[str] = ..., leaving: _Optional[bool] = ..., block_bytes: _Optional[int] = ..., listeners: _Optional[_Iterable[_Union[_cluster_pb2.Listener, _Mapping]]] = ..., metrics_address: _Optional[str] = ..., fixed_bytes: _Optional[int] = ..., model_identity: _Optional[str] = ..., trial: _Optional[str] = ..., role_changes: _Optional[int] = ..., original_context_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., routers: _Optional[_Iterable[str]] = ..., protocol: _Optional[int] = ..., oldest_protocol: _Optional[int] = ..., kept_tokens: _Optional[int] = ..., group: _Optional[str] = ..., masks_tokens: _Optional[bool] = ..., scores_prompts: _Optional[bool] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., searches_beams: _Optional[bool] = ..., unquantized_identity: _Optional[str] = ..., pairing_fingerprint: _Optional[str] = ..., weights: _Optional[str] = ..., adapters_said: _Optional[_Union[AdaptersSaid, _Mapping]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "digest", "directory", "stamp", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    directory: str
    stamp: int
    groups: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., directory: _Optional[str] = ..., stamp: _Optional[int] = ..., groups: _Optional[_Iterable[str]] = ...) -> None: ...

class AdaptersSaid(_message.Message):
    __slots__ = ("adapters", "kept", "gone", "changes", "takes_more")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    TAKES_MORE_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    kept: _containers.RepeatedCompositeFieldContainer[Adapter]
    gone: _containers.RepeatedCompositeFieldContainer[Adapter]
    changes: int
    takes_more: bool
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., kept: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., gone: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., changes: _Optional[int] = ..., takes_more: _Optional[bool] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("router_id", "heartbeat_ms", "leaving", "protocol", "oldest_protocol")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    heartbeat_ms: int
    leaving: bool
    protocol: int
    oldest_protocol: int
    def __init__(self, router_id: _Optional[str] = ..., heartbeat_ms: _Optional[int] = ..., leaving: _Optional[bool] = ..., protocol: _Optional[int] = ..., oldest_protocol: _Optional[int] = ...) -> None: ...

class ResolvedSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "stop_token_ids", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "logit_bias", "structured", "allowed_token_ids", "bad_words", "prompt_logprobs", "beams")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    logit_bias: _containers.ScalarMap[int, float]
    structured: _generate_pb2.StructuredOutput
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenIds]
    prompt_logprobs: int
    beams: Beams
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logprobs: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., structured: _Optional[_Union[_generate_pb2.StructuredOutput, _Mapping]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[_generate_pb2.TokenIds, _Mapping]]] = ..., prompt_logprobs: _Optional[int] = ..., beams: _Optional[_Union[Beams, _Mapping]] = ...) -> None: ...

class Beams(_message.Message):
    __slots__ = ("width", "answers", "length_penalty", "early_stopping")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EARLY_STOPPING_FIELD_NUMBER: _ClassVar[int]
    width: int
    answers: int
    length_penalty: float
    early_stopping: _generate_pb2.EarlyStopping
    def __init__(self, width: _Optional[int] = ..., answers: _Optional[int] = ..., length_penalty: _Optional[float] = ..., early_stopping: _Optional[_Union[_generate_pb2.EarlyStopping, str]] = ...) -> None: ...

class BeamAnswers(_message.Message):
    __slots__ = ("sequence_id", "answers")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    answers: _containers.RepeatedCompositeFieldContainer[BeamAnswer]
    def __init__(self, sequence_id: _Optional[int] = ..., answers: _Optional[_Iterable[_Union[BeamAnswer, _Mapping]]] = ...) -> None: ...

class BeamAnswer(_message.Message):
    __slots__ = ("token_ids", "score", "stopped")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    score: float
    stopped: bool
    def __init__(self, token_ids: _Optional[bytes] = ..., score: _Optional[float] = ..., stopped: _Optional[bool] = ...) -> None: ...

class HandoffRef(_message.Message):
    __slots__ = ("handoff_id", "source_worker", "source_epoch", "source_address", "ticket", "mixes_weights", "most_tokens")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MIXES_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    source_worker: str
    source_epoch: int
    source_address: str
    ticket: bytes
    mixes_weights: bool
    most_tokens: int
    def __init__(self, handoff_id: _Optional[str] = ..., source_worker: _Optional[str] = ..., source_epoch: _Optional[int] = ..., source_address: _Optional[str] = ..., ticket: _Optional[bytes] = ..., mixes_weights: _Optional[bool] = ..., most_tokens: _Optional[int] = ...) -> None: ...

class StartSequence(_message.Message):
    __slots__ = ("sequence_id", "request_id", "prompt", "emitted", "sampling", "priority", "deadline_ms", "cache_salt", "serve_handoff_id", "pull", "traceparent", "due_ms", "put_back_weight", "prefix_pull", "prefix_tokens", "prefix_wait_ms", "adapter", "mixed_kv", "acceptance")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SERVE_HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    DUE_MS_FIELD_NUMBER: _ClassVar[int]
    PUT_BACK_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PULL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MIXED_KV_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    request_id: str
    prompt: bytes
    emitted: bytes
    sampling: ResolvedSampling
    priority: int
    deadline_ms: int
    cache_salt: str
    serve_handoff_id: str
    pull: HandoffRef
    traceparent: str
    due_ms: int
    put_back_weight: float
    prefix_pull: HandoffRef
    prefix_tokens: int
    prefix_wait_ms: int
    adapter: str
    mixed_kv: bool
    acceptance: _handoff_pb2.DraftAcceptance
    def __init__(self, sequence_id: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt: _Optional[bytes] = ..., emitted: _Optional[bytes] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., cache_salt: _Optional[str] = ..., serve_handoff_id: _Optional[str] = ..., pull: _Optional[_Union[HandoffRef, _Mapping]] = ..., traceparent: _Optional[str] = ..., due_ms: _Optional[int] = ..., put_back_weight: _Optional[float] = ..., prefix_pull: _Optional[_Union[HandoffRef, _Mapping]] = ..., prefix_tokens: _Optional[int] = ..., prefix_wait_ms: _Optional[int] = ..., adapter: _Optional[str] = ..., mixed_kv: _Optional[bool] = ..., acceptance: _Optional[_Union[_handoff_pb2.DraftAcceptance, _Mapping]] = ...) -> None: ...

class ContinueLocally(_message.Message):
    __slots__ = ("sequence_id", "emitted")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    emitted: bytes
    def __init__(self, sequence_id: _Optional[int] = ..., emitted: _Optional[bytes] = ...) -> None: ...

class FollowAnother(_message.Message):
    __slots__ = ("sequence_id", "emitted", "pull")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    emitted: bytes
    pull: HandoffRef
    def __init__(self, sequence_id: _Optional[int] = ..., emitted: _Optional[bytes] = ..., pull: _Optional[_Union[HandoffRef, _Mapping]] = ...) -> None: ...

class ServeRunning(_message.Message):
    __slots__ = ("sequence_id", "handoff_id", "most_tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    handoff_id: str
    most_tokens: int
    def __init__(self, sequence_id: _Optional[int] = ..., handoff_id: _Optional[str] = ..., most_tokens: _Optional[int] = ...) -> None: ...

class ServedSequence(_message.Message):
    __slots__ = ("sequence_id", "handoff_id")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    handoff_id: str
    def __init__(self, sequence_id: _Optional[int] = ..., handoff_id: _Optional[str] = ...) -> None: ...

class CancelSequence(_message.Message):
    __slots__ = ("sequence_id", "reason", "keep_lease")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEEP_LEASE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    reason: str
    keep_lease: bool
    def __init__(self, sequence_id: _Optional[int] = ..., reason: _Optional[str] = ..., keep_lease: _Optional[bool] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("worker_id", "epoch", "address", "gone", "ticket", "mixes_weights")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MIXES_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    address: str
    gone: bool
    ticket: bytes
    mixes_weights: bool
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., gone: _Optional[bool] = ..., ticket: _Optional[bytes] = ..., mixes_weights: _Optional[bool] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("router_id", "introductions", "starts", "cancels", "continues", "follows", "serves", "freezes", "keeps", "set_role", "resync_blocks", "protocol", "oldest_protocol")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INTRODUCTIONS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    CONTINUES_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    FREEZES_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    SET_ROLE_FIELD_NUMBER: _ClassVar[int]
    RESYNC_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    introductions: _containers.RepeatedCompositeFieldContainer[Introduction]
    starts: _containers.RepeatedCompositeFieldContainer[StartSequence]
    cancels: _containers.RepeatedCompositeFieldContainer[CancelSequence]
    continues: _containers.RepeatedCompositeFieldContainer[ContinueLocally]
    follows: _containers.RepeatedCompositeFieldContainer[FollowAnother]
    serves: _containers.RepeatedCompositeFieldContainer[ServeRunning]
    freezes: _containers.RepeatedCompositeFieldContainer[ServedSequence]
    keeps: _containers.RepeatedCompositeFieldContainer[ServedSequence]
    set_role: _cluster_pb2.Role
    resync_blocks: bool
    protocol: int
    oldest_protocol: int
    def __init__(self, router_id: _Optional[str] = ..., introductions: _Optional[_Iterable[_Union[Introduction, _Mapping]]] = ..., starts: _Optional[_Iterable[_Union[StartSequence, _Mapping]]] = ..., cancels: _Optional[_Iterable[_Union[CancelSequence, _Mapping]]] = ..., continues: _Optional[_Iterable[_Union[ContinueLocally, _Mapping]]] = ..., follows: _Optional[_Iterable[_Union[FollowAnother, _Mapping]]] = ..., serves: _Optional[_Iterable[_Union[ServeRunning, _Mapping]]] = ..., freezes: _Optional[_Iterable[_Union[ServedSequence, _Mapping]]] = ..., keeps: _Optional[_Iterable[_Union[ServedSequence, _Mapping]]] = ..., set_role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., resync_blocks: _Optional[bool] = ..., protocol: _Optional[int] = ..., oldest_protocol: _Optional[int] = ...) -> None: ...

class SequenceEnd(_message.Message):
    __slots__ = ("sequence_id", "reason", "cached_tokens", "handed_over", "error", "code")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    reason: _generate_pb2.FinishReason
    cached_tokens: int
    handed_over: bool
    error: str
    code: int
    def __init__(self, sequence_id: _Optional[int] = ..., reason: _Optional[_Union[_generate_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ..., handed_over: _Optional[bool] = ..., error: _Optional[str] = ..., code: _Optional[int] = ...) -> None: ...

class HandoffFailed(_message.Message):
    __slots__ = ("sequence_id", "reason", "detail", "kept_tokens", "handoff_id")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    reason: str
    detail: str
    kept_tokens: int
    handoff_id: str
    def __init__(self, sequence_id: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., kept_tokens: _Optional[int] = ..., handoff_id: _Optional[str] = ...) -> None: ...

class HandoffAdopted(_message.Message):
    __slots__ = ("sequence_id", "pulled_bytes", "cached_tokens", "kv_early_share", "adopt_ms", "handoff_id", "transfer_ms")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    PULLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_EARLY_SHARE_FIELD_NUMBER: _ClassVar[int]
    ADOPT_MS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    pulled_bytes: int
    cached_tokens: int
    kv_early_share: float
    adopt_ms: float
    handoff_id: str
    transfer_ms: float
    def __init__(self, sequence_id: _Optional[int] = ..., pulled_bytes: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., kv_early_share: _Optional[float] = ..., adopt_ms: _Optional[float] = ..., handoff_id: _Optional[str] = ..., transfer_ms: _Optional[float] = ...) -> None: ...

class FirstStep(_message.Message):
    __slots__ = ("sequence_id", "held_ms", "queue_ms", "prefill_ms", "prefill_wait_ms", "send_ms")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    SEND_MS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    held_ms: float
    queue_ms: float
    prefill_ms: float
    prefill_wait_ms: float
    send_ms: float
    def __init__(self, sequence_id: _Optional[int] = ..., held_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., prefill_wait_ms: _Optional[float] = ..., send_ms: _Optional[float] = ...) -> None: ...

class ChunkLogprobs(_message.Message):
    __slots__ = ("sequence_id", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    logprobs: _generate_pb2.PromptLogprobs
    def __init__(self, sequence_id: _Optional[int] = ..., logprobs: _Optional[_Union[_generate_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("sequence_id", "position", "logprobs")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    position: int
    logprobs: _generate_pb2.TokenLogprobs
    def __init__(self, sequence_id: _Optional[int] = ..., position: _Optional[int] = ..., logprobs: _Optional[_Union[_generate_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class Drafted(_message.Message):
    __slots__ = ("sequence_id", "verifications", "drafts", "accepted", "acceptance")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFICATIONS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    verifications: int
    drafts: int
    accepted: int
    acceptance: _handoff_pb2.DraftAcceptance
    def __init__(self, sequence_id: _Optional[int] = ..., verifications: _Optional[int] = ..., drafts: _Optional[int] = ..., accepted: _Optional[int] = ..., acceptance: _Optional[_Union[_handoff_pb2.DraftAcceptance, _Mapping]] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("first_sequence_number", "events")
    FIRST_SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    first_sequence_number: int
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    def __init__(self, first_sequence_number: _Optional[int] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("stored", "removed", "cleared")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    stored: bytes
    removed: bytes
    cleared: bool
    def __init__(self, stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ..., cleared: _Optional[bool] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("epoch", "sequence_ids", "positions", "token_ids", "logprobs", "ends", "handoff_failures", "adoptions", "load", "block_events", "draining", "worker_id", "first_steps", "caught_up", "role", "role_changes", "prompt_logprobs", "beams", "drafted")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FAILURES_FIELD_NUMBER: _ClassVar[int]
    ADOPTIONS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEPS_FIELD_NUMBER: _ClassVar[int]
    CAUGHT_UP_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BEAMS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence_ids: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    ends: _containers.RepeatedCompositeFieldContainer[SequenceEnd]
    handoff_failures: _containers.RepeatedCompositeFieldContainer[HandoffFailed]
    adoptions: _containers.RepeatedCompositeFieldContainer[HandoffAdopted]
    load: _cluster_pb2.WorkerLoad
    block_events: BlockEvents
    draining: bool
    worker_id: str
    first_steps: _containers.RepeatedCompositeFieldContainer[FirstStep]
    caught_up: _containers.RepeatedCompositeFieldContainer[ServedSequence]
    role: _cluster_pb2.Role
    role_changes: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[ChunkLogprobs]
    beams: _containers.RepeatedCompositeFieldContainer[BeamAnswers]
    drafted: _containers.RepeatedCompositeFieldContainer[Drafted]
    def __init__(self, epoch: _Optional[int] = ..., sequence_ids: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[SequenceEnd, _Mapping]]] = ..., handoff_failures: _Optional[_Iterable[_Union[HandoffFailed, _Mapping]]] = ..., adoptions: _Optional[_Iterable[_Union[HandoffAdopted, _Mapping]]] = ..., load: _Optional[_Union[_cluster_pb2.WorkerLoad, _Mapping]] = ..., block_events: _Optional[_Union[BlockEvents, _Mapping]] = ..., draining: _Optional[bool] = ..., worker_id: _Optional[str] = ..., first_steps: _Optional[_Iterable[_Union[FirstStep, _Mapping]]] = ..., caught_up: _Optional[_Iterable[_Union[ServedSequence, _Mapping]]] = ..., role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., role_changes: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[ChunkLogprobs, _Mapping]]] = ..., beams: _Optional[_Iterable[_Union[BeamAnswers, _Mapping]]] = ..., drafted: _Optional[_Iterable[_Union[Drafted, _Mapping]]] = ...) -> None: ...

class SetAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class SetAdapterResponse(_message.Message):
    __slots__ = ("digest", "said")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    digest: str
    said: AdaptersSaid
    def __init__(self, digest: _Optional[str] = ..., said: _Optional[_Union[AdaptersSaid, _Mapping]] = ...) -> None: ...
