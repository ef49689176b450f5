from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScalingOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCALING_OUTCOME_UNSPECIFIED: _ClassVar[ScalingOutcome]
    SCALING_OUTCOME_DRY_RUN: _ClassVar[ScalingOutcome]
    SCALING_OUTCOME_UNCHANGED: _ClassVar[ScalingOutcome]
    SCALING_OUTCOME_APPLIED: _ClassVar[ScalingOutcome]
    SCALING_OUTCOME_FAILED: _ClassVar[ScalingOutcome]
SCALING_OUTCOME_UNSPECIFIED: ScalingOutcome
SCALING_OUTCOME_DRY_RUN: ScalingOutcome
SCALING_OUTCOME_UNCHANGED: ScalingOutcome
SCALING_OUTCOME_APPLIED: ScalingOutcome
SCALING_OUTCOME_FAILED: ScalingOutcome

class ScalingCounts(_message.Message):
    __slots__ = ("prefill", "decode", "standby")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    prefill: int
    decode: int
    standby: int
    def __init__(self, prefill: _Optional[int] = ..., decode: _Optional[int] = ..., standby: _Optional[int] = ...) -> None: ...

class ScalingAlternative(_message.Message):
    __slots__ = ("prefill", "decode", "prefill_strain", "decode_strain", "what", "takes_s", "verdict")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_STRAIN_FIELD_NUMBER: _ClassVar[int]
    DECODE_STRAIN_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    TAKES_S_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    prefill: int
    decode: int
    prefill_strain: float
    decode_strain: float
    what: str
    takes_s: float
    verdict: str
    def __init__(self, prefill: _Optional[int] = ..., decode: _Optional[int] = ..., prefill_strain: _Optional[float] = ..., decode_strain: _Optional[float] = ..., what: _Optional[str] = ..., takes_s: _Optional[float] = ..., verdict: _Optional[str] = ...) -> None: ...

class ScalingDecision(_message.Message):
    __slots__ = ("decider", "number", "age_ms", "interval_s", "before", "after", "ready", "rule", "reason", "shifted", "woken", "started", "stopped", "withdrawn", "outcome", "error", "numbers", "alternatives")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DECIDER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHIFTED_FIELD_NUMBER: _ClassVar[int]
    WOKEN_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    decider: str
    number: int
    age_ms: float
    interval_s: float
    before: ScalingCounts
    after: ScalingCounts
    ready: ScalingCounts
    rule: str
    reason: str
    shifted: int
    woken: int
    started: int
    stopped: int
    withdrawn: int
    outcome: ScalingOutcome
    error: str
    numbers: _containers.ScalarMap[str, float]
    alternatives: _containers.RepeatedCompositeFieldContainer[ScalingAlternative]
    def __init__(self, decider: _Optional[str] = ..., number: _Optional[int] = ..., age_ms: _Optional[float] = ..., interval_s: _Optional[float] = ..., before: _Optional[_Union[ScalingCounts, _Mapping]] = ..., after: _Optional[_Union[ScalingCounts, _Mapping]] = ..., ready: _Optional[_Union[ScalingCounts, _Mapping]] = ..., rule: _Optional[str] = ..., reason: _Optional[str] = ..., shifted: _Optional[int] = ..., woken: _Optional[int] = ..., started: _Optional[int] = ..., stopped: _Optional[int] = ..., withdrawn: _Optional[int] = ..., outcome: _Optional[_Union[ScalingOutcome, str]] = ..., error: _Optional[str] = ..., numbers: _Optional[_Mapping[str, float]] = ..., alternatives: _Optional[_Iterable[_Union[ScalingAlternative, _Mapping]]] = ...) -> None: ...

class ScalingPoint(_message.Message):
    __slots__ = ("age_ms", "wanted", "ready", "held_gpus")
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    HELD_GPUS_FIELD_NUMBER: _ClassVar[int]
    age_ms: float
    wanted: ScalingCounts
    ready: ScalingCounts
    held_gpus: float
    def __init__(self, age_ms: _Optional[float] = ..., wanted: _Optional[_Union[ScalingCounts, _Mapping]] = ..., ready: _Optional[_Union[ScalingCounts, _Mapping]] = ..., held_gpus: _Optional[float] = ...) -> None: ...
