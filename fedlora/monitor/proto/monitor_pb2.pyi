from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("finished", "rounds", "rounds_completed", "clients", "participations", "metric", "score", "score_before", "private", "epsilon_max", "epsilon_by_client", "delta", "accountant", "noise_source", "method", "seconds", "client_rounds_per_second", "bytes_up_per_client_round", "bytes_down_per_client_round", "refusals", "rejections", "refusals_by_reason", "newest")
    class ParticipationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class EpsilonByClientEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Spent
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Spent, _Mapping]] = ...) -> None: ...
    class RefusalsByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    PARTICIPATIONS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_MAX_FIELD_NUMBER: _ClassVar[int]
    EPSILON_BY_CLIENT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    ACCOUNTANT_FIELD_NUMBER: _ClassVar[int]
    NOISE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ROUNDS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_PER_CLIENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_PER_CLIENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    rounds: int
    rounds_completed: int
    clients: int
    participations: _containers.ScalarMap[str, int]
    metric: str
    score: float
    score_before: float
    private: bool
    epsilon_max: float
    epsilon_by_client: _containers.MessageMap[str, Spent]
    delta: float
    accountant: str
    noise_source: str
    method: str
    seconds: float
    client_rounds_per_second: float
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    refusals: int
    rejections: int
    refusals_by_reason: _containers.ScalarMap[str, int]
    newest: Round
    def __init__(self, finished: bool = ..., rounds: _Optional[int] = ..., rounds_completed: _Optional[int] = ..., clients: _Optional[int] = ..., participations: _Optional[_Mapping[str, int]] = ..., metric: _Optional[str] = ..., score: _Optional[float] = ..., score_before: _Optional[float] = ..., private: bool = ..., epsilon_max: _Optional[float] = ..., epsilon_by_client: _Optional[_Mapping[str, Spent]] = ..., delta: _Optional[float] = ..., accountant: _Optional[str] = ..., noise_source: _Optional[str] = ..., method: _Optional[str] = ..., seconds: _Optional[float] = ..., client_rounds_per_second: _Optional[float] = ..., bytes_up_per_client_round: _Optional[int] = ..., bytes_down_per_client_round: _Optional[int] = ..., refusals: _Optional[int] = ..., rejections: _Optional[int] = ..., refusals_by_reason: _Optional[_Mapping[str, int]] = ..., newest: _Optional[_Union[Round, _Mapping]] = ...) -> None: ...

class Spent(_message.Message):
    __slots__ = ("epsilon",)
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    def __init__(self, epsilon: _Optional[float] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("from_round",)
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    from_round: int
    def __init__(self, from_round: _Optional[int] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "asked", "answered", "refused", "rejected", "accuracy_told", "metric", "score", "loss", "epsilon_max", "seconds")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RejectedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class AccuracyToldEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_TOLD_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_MAX_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    asked: _containers.RepeatedScalarFieldContainer[str]
    answered: _containers.RepeatedScalarFieldContainer[str]
    refused: _containers.ScalarMap[str, str]
    rejected: _containers.ScalarMap[str, str]
    accuracy_told: _containers.ScalarMap[str, float]
    metric: str
    score: float
    loss: float
    epsilon_max: float
    seconds: float
    def __init__(self, round: _Optional[int] = ..., asked: _Optional[_Iterable[str]] = ..., answered: _Optional[_Iterable[str]] = ..., refused: _Optional[_Mapping[str, str]] = ..., rejected: _Optional[_Mapping[str, str]] = ..., accuracy_told: _Optional[_Mapping[str, float]] = ..., metric: _Optional[str] = ..., score: _Optional[float] = ..., loss: _Optional[float] = ..., epsilon_max: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...
