from sfl.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeviceMessage(_message.Message):
    __slots__ = ("open", "step", "evaluate", "submit", "adopt", "close", "chunk", "pause", "tensors")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ADOPT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    open: Open
    step: Step
    evaluate: Evaluate
    submit: SubmitHalf
    adopt: Adopt
    close: Close
    chunk: bytes
    pause: Pause
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., submit: _Optional[_Union[SubmitHalf, _Mapping]] = ..., adopt: _Optional[_Union[Adopt, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., chunk: _Optional[bytes] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ...) -> None: ...

class EdgeMessage(_message.Message):
    __slots__ = ("opened", "step", "evaluated", "submitted", "adopted", "closed", "chunk", "heartbeat", "paused", "tensors")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    step: StepDone
    evaluated: Evaluated
    submitted: HalfTaken
    adopted: Adopted
    closed: Closed
    chunk: bytes
    heartbeat: Heartbeat
    paused: Paused
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., step: _Optional[_Union[StepDone, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., submitted: _Optional[_Union[HalfTaken, _Mapping]] = ..., adopted: _Optional[_Union[Adopted, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., chunk: _Optional[bytes] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., paused: _Optional[_Union[Paused, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "target_modules")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("name", "learning_rate", "weight_decay", "decay_steps", "warmup_steps")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    DECAY_STEPS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    learning_rate: float
    weight_decay: float
    decay_steps: int
    warmup_steps: int
    def __init__(self, name: _Optional[str] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., decay_steps: _Optional[int] = ..., warmup_steps: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session", "device", "task", "cut", "version", "model_fingerprint", "lora", "optimizer", "seed", "dtype", "rank", "proximal", "frozen_parts", "shared_edge_adapter", "fresh_optimizer", "standing")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_FIELD_NUMBER: _ClassVar[int]
    FROZEN_PARTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_EDGE_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    FRESH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    session: str
    device: str
    task: str
    cut: int
    version: int
    model_fingerprint: str
    lora: Lora
    optimizer: Optimizer
    seed: int
    dtype: str
    rank: int
    proximal: float
    frozen_parts: _containers.RepeatedScalarFieldContainer[str]
    shared_edge_adapter: bool
    fresh_optimizer: bool
    standing: Standing
    def __init__(self, session: _Optional[str] = ..., device: _Optional[str] = ..., task: _Optional[str] = ..., cut: _Optional[int] = ..., version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., seed: _Optional[int] = ..., dtype: _Optional[str] = ..., rank: _Optional[int] = ..., proximal: _Optional[float] = ..., frozen_parts: _Optional[_Iterable[str]] = ..., shared_edge_adapter: _Optional[bool] = ..., fresh_optimizer: _Optional[bool] = ..., standing: _Optional[_Union[Standing, _Mapping]] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("resume", "restored", "checkpoints", "last_step")
    RESUME_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    resume: bool
    restored: bool
    checkpoints: _containers.RepeatedScalarFieldContainer[int]
    last_step: int
    def __init__(self, resume: _Optional[bool] = ..., restored: _Optional[bool] = ..., checkpoints: _Optional[_Iterable[int]] = ..., last_step: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("last_step", "checkpoint", "lost", "edge")
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    last_step: int
    checkpoint: int
    lost: bool
    edge: str
    def __init__(self, last_step: _Optional[int] = ..., checkpoint: _Optional[int] = ..., lost: _Optional[bool] = ..., edge: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "version", "learning_rate_factor", "checkpoint", "logit_offsets")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LOGIT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    step: int
    version: int
    learning_rate_factor: float
    checkpoint: int
    logit_offsets: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, step: _Optional[int] = ..., version: _Optional[int] = ..., learning_rate_factor: _Optional[float] = ..., checkpoint: _Optional[int] = ..., logit_offsets: _Optional[_Iterable[float]] = ...) -> None: ...

class StepDone(_message.Message):
    __slots__ = ("step", "version", "loss", "layer_norms")
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LAYER_NORMS_FIELD_NUMBER: _ClassVar[int]
    step: int
    version: int
    loss: float
    layer_norms: _containers.RepeatedCompositeFieldContainer[LayerNorm]
    def __init__(self, step: _Optional[int] = ..., version: _Optional[int] = ..., loss: _Optional[float] = ..., layer_norms: _Optional[_Iterable[_Union[LayerNorm, _Mapping]]] = ...) -> None: ...

class LayerNorm(_message.Message):
    __slots__ = ("layer", "norm")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    norm: float
    def __init__(self, layer: _Optional[int] = ..., norm: _Optional[float] = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("loss", "count")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    loss: float
    count: int
    def __init__(self, loss: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class SubmitHalf(_message.Message):
    __slots__ = ("submission", "version", "checkpoint")
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    submission: str
    version: int
    checkpoint: int
    def __init__(self, submission: _Optional[str] = ..., version: _Optional[int] = ..., checkpoint: _Optional[int] = ...) -> None: ...

class HalfTaken(_message.Message):
    __slots__ = ("submission",)
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    submission: str
    def __init__(self, submission: _Optional[str] = ...) -> None: ...

class Adopt(_message.Message):
    __slots__ = ("version", "keep_progress", "checkpoint")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEEP_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    version: int
    keep_progress: bool
    checkpoint: int
    def __init__(self, version: _Optional[int] = ..., keep_progress: _Optional[bool] = ..., checkpoint: _Optional[int] = ...) -> None: ...

class Adopted(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ("checkpoint",)
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    checkpoint: int
    def __init__(self, checkpoint: _Optional[int] = ...) -> None: ...

class Paused(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Closed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
