from diptych.v1 import generate_pb2 as _generate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerHello(_message.Message):
    __slots__ = ("worker_id", "epoch", "layout_fingerprint", "transport", "endpoint", "ticket", "pairing_fingerprint", "mixes_weights", "protocol", "oldest_protocol")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PAIRING_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MIXES_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    layout_fingerprint: str
    transport: str
    endpoint: bytes
    ticket: bytes
    pairing_fingerprint: str
    mixes_weights: bool
    protocol: int
    oldest_protocol: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., layout_fingerprint: _Optional[str] = ..., transport: _Optional[str] = ..., endpoint: _Optional[bytes] = ..., ticket: _Optional[bytes] = ..., pairing_fingerprint: _Optional[str] = ..., mixes_weights: _Optional[bool] = ..., protocol: _Optional[int] = ..., oldest_protocol: _Optional[int] = ...) -> None: ...

class Follow(_message.Message):
    __slots__ = ("handoff_id", "ticket")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    ticket: bytes
    def __init__(self, handoff_id: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class RenewLease(_message.Message):
    __slots__ = ("handoff_id",)
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    def __init__(self, handoff_id: _Optional[str] = ...) -> None: ...

class ReleaseLease(_message.Message):
    __slots__ = ("handoff_id", "adopted")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    adopted: bool
    def __init__(self, handoff_id: _Optional[str] = ..., adopted: _Optional[bool] = ...) -> None: ...

class LendPrefix(_message.Message):
    __slots__ = ("handoff_id", "names", "ticket")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    names: bytes
    ticket: bytes
    def __init__(self, handoff_id: _Optional[str] = ..., names: _Optional[bytes] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "follows", "renews", "releases", "lends", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    RENEWS_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    LENDS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    follows: _containers.RepeatedCompositeFieldContainer[Follow]
    renews: _containers.RepeatedCompositeFieldContainer[RenewLease]
    releases: _containers.RepeatedCompositeFieldContainer[ReleaseLease]
    lends: _containers.RepeatedCompositeFieldContainer[LendPrefix]
    ping: bool
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., follows: _Optional[_Iterable[_Union[Follow, _Mapping]]] = ..., renews: _Optional[_Iterable[_Union[RenewLease, _Mapping]]] = ..., releases: _Optional[_Iterable[_Union[ReleaseLease, _Mapping]]] = ..., lends: _Optional[_Iterable[_Union[LendPrefix, _Mapping]]] = ..., ping: _Optional[bool] = ...) -> None: ...

class AnnounceBlocks(_message.Message):
    __slots__ = ("handoff_id", "first_index", "block_ids", "generations", "digests", "group")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    first_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedScalarFieldContainer[int]
    group: int
    def __init__(self, handoff_id: _Optional[str] = ..., first_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[int]] = ..., group: _Optional[int] = ...) -> None: ...

class AnnounceFinal(_message.Message):
    __slots__ = ("handoff_id", "num_tokens", "emitted", "logprobs", "acceptance")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    num_tokens: int
    emitted: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenLogprobs]
    acceptance: DraftAcceptance
    def __init__(self, handoff_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., emitted: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generate_pb2.TokenLogprobs, _Mapping]]] = ..., acceptance: _Optional[_Union[DraftAcceptance, _Mapping]] = ...) -> None: ...

class DraftAcceptance(_message.Message):
    __slots__ = ("method", "accepted", "tried", "at_tokens")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TRIED_FIELD_NUMBER: _ClassVar[int]
    AT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    method: str
    accepted: float
    tried: float
    at_tokens: int
    def __init__(self, method: _Optional[str] = ..., accepted: _Optional[float] = ..., tried: _Optional[float] = ..., at_tokens: _Optional[int] = ...) -> None: ...

class HandoffRefused(_message.Message):
    __slots__ = ("handoff_id", "reason", "detail")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    reason: str
    detail: str
    def __init__(self, handoff_id: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("hello", "blocks", "finals", "refusals", "pong")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FINALS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    blocks: _containers.RepeatedCompositeFieldContainer[AnnounceBlocks]
    finals: _containers.RepeatedCompositeFieldContainer[AnnounceFinal]
    refusals: _containers.RepeatedCompositeFieldContainer[HandoffRefused]
    pong: bool
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[AnnounceBlocks, _Mapping]]] = ..., finals: _Optional[_Iterable[_Union[AnnounceFinal, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[HandoffRefused, _Mapping]]] = ..., pong: _Optional[bool] = ...) -> None: ...
