from sfl.v1 import split_pb2 as _split_pb2
from sfl.v1 import tensor_pb2 as _tensor_pb2
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
    DEVICE: _ClassVar[Role]
    EDGE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
DEVICE: Role
EDGE: Role

class JoinRequest(_message.Message):
    __slots__ = ("name", "role", "task", "base_model", "model_fingerprint", "lora", "cut", "examples", "labels", "columns", "max_length", "rank", "edge", "federation", "label_counts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    LABEL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    task: str
    base_model: str
    model_fingerprint: str
    lora: _split_pb2.Lora
    cut: int
    examples: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    columns: _containers.RepeatedScalarFieldContainer[str]
    max_length: int
    rank: int
    edge: str
    federation: str
    label_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., task: _Optional[str] = ..., base_model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., lora: _Optional[_Union[_split_pb2.Lora, _Mapping]] = ..., cut: _Optional[int] = ..., examples: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., columns: _Optional[_Iterable[str]] = ..., max_length: _Optional[int] = ..., rank: _Optional[int] = ..., edge: _Optional[str] = ..., federation: _Optional[str] = ..., label_counts: _Optional[_Iterable[int]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("federation",)
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    federation: str
    def __init__(self, federation: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("name", "federation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    federation: str
    def __init__(self, name: _Optional[str] = ..., federation: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("waiting", "agreement", "published", "finished", "heartbeat")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    waiting: Waiting
    agreement: Agreement
    published: Published
    finished: Finished
    heartbeat: _split_pb2.Heartbeat
    def __init__(self, waiting: _Optional[_Union[Waiting, _Mapping]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., published: _Optional[_Union[Published, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., heartbeat: _Optional[_Union[_split_pb2.Heartbeat, _Mapping]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("joined", "expected", "proposal", "edges")
    JOINED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    joined: int
    expected: int
    proposal: bool
    edges: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, joined: _Optional[int] = ..., expected: _Optional[int] = ..., proposal: _Optional[bool] = ..., edges: _Optional[_Iterable[str]] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("labels", "columns", "max_length", "policy")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    columns: _containers.RepeatedScalarFieldContainer[str]
    max_length: int
    policy: UploadPolicy
    def __init__(self, labels: _Optional[_Iterable[str]] = ..., columns: _Optional[_Iterable[str]] = ..., max_length: _Optional[int] = ..., policy: _Optional[_Union[UploadPolicy, _Mapping]] = ...) -> None: ...

class UploadPolicy(_message.Message):
    __slots__ = ("keep_progress", "final_upload", "periodic", "triggered", "proximal", "frozen_parts", "shared_edge_adapter", "fresh_optimizer", "feedback", "adopt_after_upload", "logit_offsets")
    KEEP_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FINAL_UPLOAD_FIELD_NUMBER: _ClassVar[int]
    PERIODIC_FIELD_NUMBER: _ClassVar[int]
    TRIGGERED_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    FROZEN_PARTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_EDGE_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FRESH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    ADOPT_AFTER_UPLOAD_FIELD_NUMBER: _ClassVar[int]
    LOGIT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    keep_progress: bool
    final_upload: bool
    periodic: Periodic
    triggered: Triggered
    proximal: float
    frozen_parts: _containers.RepeatedScalarFieldContainer[str]
    shared_edge_adapter: bool
    fresh_optimizer: bool
    feedback: Feedback
    adopt_after_upload: bool
    logit_offsets: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, keep_progress: _Optional[bool] = ..., final_upload: _Optional[bool] = ..., periodic: _Optional[_Union[Periodic, _Mapping]] = ..., triggered: _Optional[_Union[Triggered, _Mapping]] = ..., proximal: _Optional[float] = ..., frozen_parts: _Optional[_Iterable[str]] = ..., shared_edge_adapter: _Optional[bool] = ..., fresh_optimizer: _Optional[bool] = ..., feedback: _Optional[_Union[Feedback, _Mapping]] = ..., adopt_after_upload: _Optional[bool] = ..., logit_offsets: _Optional[_Iterable[float]] = ...) -> None: ...

class Periodic(_message.Message):
    __slots__ = ("local_steps", "round_timeout_s")
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    local_steps: int
    round_timeout_s: float
    def __init__(self, local_steps: _Optional[int] = ..., round_timeout_s: _Optional[float] = ...) -> None: ...

class Triggered(_message.Message):
    __slots__ = ("alpha", "beta", "min_steps", "validate_every", "threshold", "threshold_growth", "threshold_decay", "metric", "max_steps", "network", "reference_every")
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    MIN_STEPS_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_EVERY_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_GROWTH_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_DECAY_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_EVERY_FIELD_NUMBER: _ClassVar[int]
    alpha: float
    beta: float
    min_steps: int
    validate_every: int
    threshold: float
    threshold_growth: float
    threshold_decay: float
    metric: str
    max_steps: int
    network: NetworkSense
    reference_every: int
    def __init__(self, alpha: _Optional[float] = ..., beta: _Optional[float] = ..., min_steps: _Optional[int] = ..., validate_every: _Optional[int] = ..., threshold: _Optional[float] = ..., threshold_growth: _Optional[float] = ..., threshold_decay: _Optional[float] = ..., metric: _Optional[str] = ..., max_steps: _Optional[int] = ..., network: _Optional[_Union[NetworkSense, _Mapping]] = ..., reference_every: _Optional[int] = ...) -> None: ...

class NetworkSense(_message.Message):
    __slots__ = ("budget", "lowest", "highest")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    budget: float
    lowest: float
    highest: float
    def __init__(self, budget: _Optional[float] = ..., lowest: _Optional[float] = ..., highest: _Optional[float] = ...) -> None: ...

class Feedback(_message.Message):
    __slots__ = ("decrease", "increase", "lowest", "patience", "margin")
    DECREASE_FIELD_NUMBER: _ClassVar[int]
    INCREASE_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    decrease: float
    increase: float
    lowest: float
    patience: int
    margin: float
    def __init__(self, decrease: _Optional[float] = ..., increase: _Optional[float] = ..., lowest: _Optional[float] = ..., patience: _Optional[int] = ..., margin: _Optional[float] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class AdapterMessage(_message.Message):
    __slots__ = ("proposal", "update", "version", "chunk", "tensors")
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    proposal: ProposalHeader
    update: UpdateHeader
    version: VersionHeader
    chunk: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    def __init__(self, proposal: _Optional[_Union[ProposalHeader, _Mapping]] = ..., update: _Optional[_Union[UpdateHeader, _Mapping]] = ..., version: _Optional[_Union[VersionHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ...) -> None: ...

class ProposalHeader(_message.Message):
    __slots__ = ("edge", "blocks", "head", "num_layers")
    EDGE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    edge: str
    blocks: str
    head: _containers.RepeatedScalarFieldContainer[str]
    num_layers: int
    def __init__(self, edge: _Optional[str] = ..., blocks: _Optional[str] = ..., head: _Optional[_Iterable[str]] = ..., num_layers: _Optional[int] = ...) -> None: ...

class ProposeReply(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: _Optional[bool] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("submission", "device", "half", "version", "examples", "steps", "link")
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HALF_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    submission: str
    device: str
    half: Role
    version: int
    examples: int
    steps: int
    link: Link
    def __init__(self, submission: _Optional[str] = ..., device: _Optional[str] = ..., half: _Optional[_Union[Role, str]] = ..., version: _Optional[int] = ..., examples: _Optional[int] = ..., steps: _Optional[int] = ..., link: _Optional[_Union[Link, _Mapping]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("bytes_per_s", "round_trip_s", "failures")
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: float
    round_trip_s: float
    failures: int
    def __init__(self, bytes_per_s: _Optional[float] = ..., round_trip_s: _Optional[float] = ..., failures: _Optional[int] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("whole",)
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    whole: bool
    def __init__(self, whole: _Optional[bool] = ...) -> None: ...

class VersionHeader(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("name", "version", "first_layer", "last_layer", "rank", "newest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    first_layer: int
    last_layer: int
    rank: int
    newest: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., rank: _Optional[int] = ..., newest: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("name", "evaluates")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_FIELD_NUMBER: _ClassVar[int]
    name: str
    evaluates: bool
    def __init__(self, name: _Optional[str] = ..., evaluates: _Optional[bool] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("refusal", "error", "time")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    error: int
    time: float
    def __init__(self, refusal: _Optional[str] = ..., error: _Optional[int] = ..., time: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("name", "activity", "sfl", "uptime_s", "memory_bytes", "peak_memory_bytes", "bytes_sent", "bytes_received", "steps", "ended", "every_s", "planned_steps", "version", "submissions", "loss", "step_age_s", "step_s", "edge_wait_s", "stepping", "upload_s", "sessions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    SFL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    PLANNED_STEPS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    EDGE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    STEPPING_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_S_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    activity: str
    sfl: str
    uptime_s: float
    memory_bytes: int
    peak_memory_bytes: int
    bytes_sent: int
    bytes_received: int
    steps: int
    ended: bool
    every_s: float
    planned_steps: int
    version: int
    submissions: int
    loss: float
    step_age_s: float
    step_s: float
    edge_wait_s: float
    stepping: bool
    upload_s: float
    sessions: _containers.RepeatedCompositeFieldContainer[SessionReport]
    def __init__(self, name: _Optional[str] = ..., activity: _Optional[str] = ..., sfl: _Optional[str] = ..., uptime_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., peak_memory_bytes: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., steps: _Optional[int] = ..., ended: _Optional[bool] = ..., every_s: _Optional[float] = ..., planned_steps: _Optional[int] = ..., version: _Optional[int] = ..., submissions: _Optional[int] = ..., loss: _Optional[float] = ..., step_age_s: _Optional[float] = ..., step_s: _Optional[float] = ..., edge_wait_s: _Optional[float] = ..., stepping: _Optional[bool] = ..., upload_s: _Optional[float] = ..., sessions: _Optional[_Iterable[_Union[SessionReport, _Mapping]]] = ...) -> None: ...

class SessionReport(_message.Message):
    __slots__ = ("device", "step", "compute_s", "queue_s", "step_age_s")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    device: str
    step: int
    compute_s: float
    queue_s: float
    step_age_s: float
    def __init__(self, device: _Optional[str] = ..., step: _Optional[int] = ..., compute_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., step_age_s: _Optional[float] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("time", "sfl", "name", "uptime_s", "state", "version", "version_age_s", "joined", "expected", "aggregations", "submissions", "refused", "pooled", "memory_bytes", "bytes_sent", "bytes_received", "members")
    TIME_FIELD_NUMBER: _ClassVar[int]
    SFL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_AGE_S_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    AGGREGATIONS_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    time: float
    sfl: str
    name: str
    uptime_s: float
    state: str
    version: int
    version_age_s: float
    joined: int
    expected: int
    aggregations: int
    submissions: int
    refused: int
    pooled: _containers.RepeatedScalarFieldContainer[str]
    memory_bytes: int
    bytes_sent: int
    bytes_received: int
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    def __init__(self, time: _Optional[float] = ..., sfl: _Optional[str] = ..., name: _Optional[str] = ..., uptime_s: _Optional[float] = ..., state: _Optional[str] = ..., version: _Optional[int] = ..., version_age_s: _Optional[float] = ..., joined: _Optional[int] = ..., expected: _Optional[int] = ..., aggregations: _Optional[int] = ..., submissions: _Optional[int] = ..., refused: _Optional[int] = ..., pooled: _Optional[_Iterable[str]] = ..., memory_bytes: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "role", "presence", "heard_s", "cut", "examples", "edge", "submissions", "link", "report", "report_age_s", "slow")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    HEARD_S_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    SLOW_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    presence: str
    heard_s: float
    cut: int
    examples: int
    edge: str
    submissions: int
    link: Link
    report: ReportRequest
    report_age_s: float
    slow: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., presence: _Optional[str] = ..., heard_s: _Optional[float] = ..., cut: _Optional[int] = ..., examples: _Optional[int] = ..., edge: _Optional[str] = ..., submissions: _Optional[int] = ..., link: _Optional[_Union[Link, _Mapping]] = ..., report: _Optional[_Union[ReportRequest, _Mapping]] = ..., report_age_s: _Optional[float] = ..., slow: _Optional[str] = ...) -> None: ...
