"""An .onnx file may come from anybody: it opens no other file, runs no other code, takes no memory without end."""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import pytest

from safelight.errors import UserError
from safelight.trainer.tagging import onnx_file
from safelight.trainer.tagging.onnx_file import check_graph, open_onnx
from tests.trainer.tagging.conftest import ROWS
from tests.trainer.tagging.onnx_maker import OPSET, attribute, detector, field, info, model, node, tensor

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ONE = np.ones((1, 3, 64, 64), dtype=np.float32)
IMAGES, OUTPUT = info("images", ONE.shape), info("output", (1, 84, 85))
RELU = node("Relu", ("images",), ("output",))
ENTRY = field(13, field(1, "location") + field(2, "/etc/passwd"))


def graph(*nodes: bytes, initializers: tuple = (), **more) -> bytes:
    return model(nodes, initializers, (IMAGES,), (OUTPUT,), **more)


HOSTILE = {
    "weights in another file": graph(RELU, initializers=(tensor("w", ONE) + ENTRY + field(14, 1),)),
    "only marked as external": graph(RELU, initializers=(tensor("w", ONE) + field(14, 1),)),
    "a constant in another file": graph(node("Constant", (), ("output",), attribute("value", 4, 5, ENTRY))),
    "a list of tensors": graph(node("Constant", (), ("output",), attribute("value", 9, 10, ENTRY))),
    "a custom operator": graph(node("Relu", ("images",), ("output",), field(7, "stranger.ops"))),
    "a custom domain": graph(RELU, opsets=(field(2, OPSET), field(1, "stranger.ops") + field(2, 1))),
    "the runtime's own operators": graph(node("Relu", ("images",), ("output",), field(7, "com.microsoft"))),
    "a loop": graph(node("Loop", ("images",), ("output",), attribute("body", 5, 6, field(1, RELU)))),
    "a graph within": graph(node("Relu", ("images",), ("output",), attribute("body", 5, 6, field(1, RELU)))),
    "a branch": graph(node("If", ("images",), ("output",))),
    "a size by number": graph(node("ConstantOfShape", ("images",), ("output",))),
    "a function": graph(RELU, more=field(25, field(1, "f"))),
    "a training graph": graph(RELU, more=field(20, field(1, b""))),
    "sparse weights": field(7, field(1, RELU) + field(15, b"")),
    "a second graph": graph(RELU) + field(7, field(1, RELU)),
    "no graph": field(1, 8),
    "no operators": graph(),
    "an operator's name as a number": graph(field(4, 7)),
    "too many operators": graph(*[RELU] * 20_001),
    "too many fields": graph(RELU, more=b"\x08\x01" * 2**20),
    "nothing": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_detector_does_not_need_is_refused_before_the_runtime_sees_it(tmp_path, monkeypatch, name):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was asked"))
    (tmp_path / "x.onnx").write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(UserError) as error:
        open_onnx(tmp_path / "x.onnx")
    assert time.process_time() - start < 3
    assert "x.onnx is not used: it" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_graph_without_the_trick_is_accepted():
    check_graph(graph(RELU, initializers=(tensor("w", ONE) + field(14, 0),)))
    check_graph(detector(ROWS))


@pytest.mark.parametrize("source", ["images", "weights"])
def test_memory_is_bounded(tmp_path, source):
    """A picture is enlarged to 7.5 GB, or weights are, which the runtime does when it loads the file."""
    content = model(
        (node("Resize", (source, "", "factors"), ("large",)), node("ReduceMax", ("large",), ("output",))),
        (tensor("factors", np.array([1, 1, 400, 400], dtype=np.float32)), tensor("weights", ONE)),
        (IMAGES,),
        (info("output", (1, 1, 1, 1)),),
    )
    path = tmp_path / "large.onnx"
    path.write_bytes(content)

    def run():
        session, _ = open_onnx(path)
        session.run(None, {"images": ONE})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception, match=r"smaller than requested|allocate"):
        run()
    # KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.onnx").write_bytes(detector(ROWS))
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="over the limit of 1,000"):
        open_onnx(tmp_path / "x.onnx")
    with pytest.raises(UserError, match="not a regular file but a folder"):
        open_onnx(tmp_path)


def test_without_onnxruntime_the_message_has_the_pip_line(tmp_path, monkeypatch):
    (tmp_path / "x.onnx").write_bytes(detector(ROWS))
    onnx_file._runtime.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="run `pip install onnxruntime`"):
        open_onnx(tmp_path / "x.onnx")
