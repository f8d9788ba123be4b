"""Opens an .onnx file that somebody else may have made, with onnxruntime.

The runtime is given the checked bytes, never a path. Before that, the graph is walked in the file's own encoding
(protobuf): data in other files, operators of other domains, functions, loops and branches are refused, and so is every
operator that the kind of model does not need. Memory is bounded by the runtime's own allocator.
Format: github.com/onnx/onnx, onnx.proto.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import UserError, first_line
from safelight.untrusted import UnsafeFile, read_bytes

# YOLOX-x in fp32 has 397 MB
MAX_BYTES = 2**29
MAX_NODES = 20_000
# a small message for each; YOLOX-x has 30,000
MAX_FIELDS = 2**20
MAX_MEMORY_BYTES = 2**32
# what detectors consist of. No loops, branches and random numbers, and nothing that makes a large tensor of a number
_DETECTOR_OPERATORS = frozenset(
    "Add AveragePool BatchNormalization Cast Clip Concat Constant Conv Div Exp Flatten Floor Gather GlobalAveragePool "
    "HardSigmoid HardSwish Identity LeakyRelu MatMul MaxPool Mul PRelu ReduceMax ReduceMean Relu Reshape Resize Shape "
    "Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Upsample".split()
)
# what classifiers and vision transformers have beyond it. Some make tensors of any size, which the allocator bounds
_MORE_OPERATORS = frozenset(
    "Abs ConstantOfShape Elu Equal Erf Expand Gelu Gemm GlobalMaxPool InstanceNormalization LayerNormalization LRN Neg "
    "Pad Pow ReduceL2 ReduceSum Where".split()
)
NO_MODEL = "it is not an ONNX model, or damaged"
DOMAINS = ("", "ai.onnx")
# the fields that are looked at, by the numbers that onnx.proto gives them
GRAPH, OPSET, FUNCTIONS, TRAINING = 7, 8, 25, 20
NODE, INITIALIZER, SPARSE_INITIALIZER = 1, 5, 15
OP_TYPE, ATTRIBUTE, DOMAIN = 4, 5, 7
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
EXTERNAL_DATA, DATA_LOCATION = 13, 14


@dataclass(frozen=True)
class OnnxKind:
    """What a file is opened for. what: in messages, with its article. fix: what to give instead of a refused file.

    instead: what to give if onnxruntime is not installed.
    """

    what: str
    operators: frozenset[str]
    fix: str
    instead: str


DETECTOR = OnnxKind(
    "a detector",
    _DETECTOR_OPERATORS,
    "give a YOLOX model as its export writes it",
    "give --tags-from-detector a detector of transformers",
)
EXTRACTOR = OnnxKind(
    "a feature extractor",
    _DETECTOR_OPERATORS | _MORE_OPERATORS,
    "give a model that turns one picture into one vector",
    "give a CLIP or DINOv2 of transformers",
)


def open_onnx(path: Path, kind: OnnxKind = DETECTOR):
    """Return (onnxruntime's session of a file, on the CPU; the hash of its bytes). Raises UserError."""
    try:
        content = read_bytes(path, MAX_BYTES)
    except UnsafeFile:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        runtime = _runtime()
    except ImportError:
        raise UserError(
            f"onnxruntime, which runs .onnx files, is not installed; run `pip install onnxruntime`, or {kind.instead}"
        ) from None
    try:
        check_graph(content, kind)
    except UnsafeFile as error:
        raise UserError(f"{path} is not used: {error}; {kind.fix}") from None
    options = runtime.SessionOptions()
    # errors come as exceptions
    options.log_severity_level = 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions have no other base
    except Exception as error:
        raise UserError(f"{path} is damaged, or no model that onnxruntime can run ({first_line(error)})") from None
    return session, hashlib.sha256(content).hexdigest()


@functools.cache
def _runtime():
    """Return onnxruntime, whose sessions share an allocator that is bounded. Raises ImportError if it is missing."""
    import onnxruntime

    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg({"max_mem": MAX_MEMORY_BYTES}))
    return onnxruntime


def check_graph(content: bytes, kind: OnnxKind = DETECTOR) -> None:
    """Raise UnsafeFile if a serialized ModelProto has anything but tensors in it and the operators of its kind."""
    _Check(kind).model(memoryview(content))


class _Check:
    """Walks a model. Of a field that may occur once, every occurrence is checked: readers differ in which they use."""

    def __init__(self, kind: OnnxKind):
        self._kind = kind
        self.num_fields = self.num_nodes = 0

    def model(self, message: memoryview) -> None:
        graphs = []
        for field, value in self.fields(message):
            if field == GRAPH:
                graphs.append(value)
            elif field == OPSET:
                for number, inner in self.fields(value):
                    if number == 1:
                        self.domain(_text(inner))
            elif field in (FUNCTIONS, TRAINING):
                raise UnsafeFile(f"it defines functions or a training graph, which {self._kind.what} does not need")
        if len(graphs) != 1:
            raise UnsafeFile("it is not an ONNX model: it has no graph")
        for field, value in self.fields(graphs[0]):
            if field == NODE:
                self.node(value)
            elif field == INITIALIZER:
                self.tensor(value)
            elif field == SPARSE_INITIALIZER:
                raise UnsafeFile(f"it has sparse weights, which {self._kind.what} does not need")
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise UnsafeFile(f"it has {self.num_nodes:,} operators, outside 1 to {MAX_NODES:,}")

    def node(self, message: memoryview | int) -> None:
        self.num_nodes += 1
        for field, value in self.fields(message):
            if field == OP_TYPE and (name := _text(value)) not in self._kind.operators:
                raise UnsafeFile(f"it uses the operator {name!r:.60}, which {self._kind.what} does not need")
            if field == DOMAIN:
                self.domain(_text(value))
            if field == ATTRIBUTE:
                self.attribute(value)

    def attribute(self, message: memoryview | int) -> None:
        for field, value in self.fields(message):
            if field in ATTRIBUTE_TENSORS:
                self.tensor(value)
            elif field in (*ATTRIBUTE_GRAPHS, *ATTRIBUTE_SPARSE):
                raise UnsafeFile(
                    f"it has graphs within its graph, or sparse tensors, which {self._kind.what} does not need"
                )

    def tensor(self, message: memoryview | int) -> None:
        for field, value in self.fields(message):
            if field == EXTERNAL_DATA or (field == DATA_LOCATION and value != 0):
                raise UnsafeFile("its weights lie in another file, which is never opened; save it as a single file")

    def domain(self, name: str) -> None:
        if name not in DOMAINS:
            raise UnsafeFile(f"it uses operators of {name!r:.60}, which are code of its own")

    def fields(self, message: memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
        """Yield (number, value) of a protobuf message's fields; a value is an integer, or bytes that are not copied.

        Raises UnsafeFile if it is cut off or malformed, or if there were more than MAX_FIELDS in all.
        """
        if isinstance(message, int):
            raise UnsafeFile(NO_MODEL)
        at = 0
        while at < len(message):
            self.num_fields += 1
            if self.num_fields > MAX_FIELDS:
                raise UnsafeFile(f"it has more than {MAX_FIELDS:,} fields")
            key, at = _varint(message, at)
            wire = key & 7
            if wire == 0:
                value, at = _varint(message, at)
                yield key >> 3, value
                continue
            size = {1: 8, 5: 4}.get(wire, len(message) + 1)
            if wire == 2:
                size, at = _varint(message, at)
            if size > len(message) - at:
                raise UnsafeFile(NO_MODEL)
            yield key >> 3, message[at : at + size]
            at += size


def _text(value: memoryview | int) -> str:
    return "" if isinstance(value, int) else bytes(value[:200]).decode("utf-8", errors="replace")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return (an integer of 7 bits a byte, where it ends)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise UnsafeFile(NO_MODEL)
