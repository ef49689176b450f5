from diptych.v1 import cluster_pb2 as _cluster_pb2
from diptych.v1 import scaling_pb2 as _scaling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SwitchRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role", "force")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _cluster_pb2.Role
    force: bool
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_cluster_pb2.Role, str]] = ..., force: _Optional[bool] = ...) -> None: ...

class SwitchRoleResponse(_message.Message):
    __slots__ = ("switch", "took_ms")
    SWITCH_FIELD_NUMBER: _ClassVar[int]
    TOOK_MS_FIELD_NUMBER: _ClassVar[int]
    switch: RoleSwitch
    took_ms: float
    def __init__(self, switch: _Optional[_Union[RoleSwitch, _Mapping]] = ..., took_ms: _Optional[float] = ...) -> None: ...

class RoleSwitch(_message.Message):
    __slots__ = ("worker_id", "before", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    before: _cluster_pb2.Role
    role: _cluster_pb2.Role
    def __init__(self, worker_id: _Optional[str] = ..., before: _Optional[_Union[_cluster_pb2.Role, str]] = ..., role: _Optional[_Union[_cluster_pb2.Role, str]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "force", "timeout_ms", "interval_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    force: bool
    timeout_ms: int
    interval_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., force: _Optional[bool] = ..., timeout_ms: _Optional[int] = ..., interval_ms: _Optional[int] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("worker_id", "left", "migrating", "migrated", "ended", "running_sequences", "done", "elapsed_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    MIGRATING_FIELD_NUMBER: _ClassVar[int]
    MIGRATED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    left: int
    migrating: int
    migrated: int
    ended: int
    running_sequences: int
    done: bool
    elapsed_ms: float
    def __init__(self, worker_id: _Optional[str] = ..., left: _Optional[int] = ..., migrating: _Optional[int] = ..., migrated: _Optional[int] = ..., ended: _Optional[int] = ..., running_sequences: _Optional[int] = ..., done: _Optional[bool] = ..., elapsed_ms: _Optional[float] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("request_id", "target_worker")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_WORKER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    target_worker: str
    def __init__(self, request_id: _Optional[str] = ..., target_worker: _Optional[str] = ...) -> None: ...

class MigrateResponse(_message.Message):
    __slots__ = ("migration",)
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    migration: _cluster_pb2.Migration
    def __init__(self, migration: _Optional[_Union[_cluster_pb2.Migration, _Mapping]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("prefill", "decode", "force", "dry_run")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    prefill: int
    decode: int
    force: bool
    dry_run: bool
    def __init__(self, prefill: _Optional[int] = ..., decode: _Optional[int] = ..., force: _Optional[bool] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("switches", "prefill", "decode", "standby", "asked")
    SWITCHES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    switches: _containers.RepeatedCompositeFieldContainer[RoleSwitch]
    prefill: int
    decode: int
    standby: int
    asked: str
    def __init__(self, switches: _Optional[_Iterable[_Union[RoleSwitch, _Mapping]]] = ..., prefill: _Optional[int] = ..., decode: _Optional[int] = ..., standby: _Optional[int] = ..., asked: _Optional[str] = ...) -> None: ...

class TellScalingRequest(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: _scaling_pb2.ScalingDecision
    def __init__(self, decision: _Optional[_Union[_scaling_pb2.ScalingDecision, _Mapping]] = ...) -> None: ...

class TellScalingResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[ServedAdapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[ServedAdapter, _Mapping]]] = ...) -> None: ...

class ServedAdapter(_message.Message):
    __slots__ = ("name", "digest", "directory", "served", "split", "groups", "workers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    directory: str
    served: bool
    split: bool
    groups: _containers.RepeatedScalarFieldContainer[str]
    workers: _containers.RepeatedCompositeFieldContainer[AdapterOnWorker]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., directory: _Optional[str] = ..., served: _Optional[bool] = ..., split: _Optional[bool] = ..., groups: _Optional[_Iterable[str]] = ..., workers: _Optional[_Iterable[_Union[AdapterOnWorker, _Mapping]]] = ...) -> None: ...

class AdapterOnWorker(_message.Message):
    __slots__ = ("worker_id", "has", "in_slot", "error")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_FIELD_NUMBER: _ClassVar[int]
    IN_SLOT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    has: bool
    in_slot: bool
    error: str
    def __init__(self, worker_id: _Optional[str] = ..., has: _Optional[bool] = ..., in_slot: _Optional[bool] = ..., error: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "directory", "groups", "timeout_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    directory: str
    groups: _containers.RepeatedScalarFieldContainer[str]
    timeout_ms: int
    def __init__(self, name: _Optional[str] = ..., directory: _Optional[str] = ..., groups: _Optional[_Iterable[str]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "replaced", "took_ms")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    TOOK_MS_FIELD_NUMBER: _ClassVar[int]
    adapter: ServedAdapter
    replaced: str
    took_ms: float
    def __init__(self, adapter: _Optional[_Union[ServedAdapter, _Mapping]] = ..., replaced: _Optional[str] = ..., took_ms: _Optional[float] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("digest", "workers")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    workers: _containers.RepeatedCompositeFieldContainer[AdapterOnWorker]
    def __init__(self, digest: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[AdapterOnWorker, _Mapping]]] = ...) -> None: ...
