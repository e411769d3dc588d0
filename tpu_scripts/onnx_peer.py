"""The convolutional and dense models of the benchmarks in ONNX Runtime, int8: what to compare with on a CPU.

The graphs are written out by hand, in float, and quantized by ONNX Runtime's own tool: QDQ, signed, weights per
channel, activations from calibration. Takes `onnx` and `onnxruntime`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench_models import Params, bottlenecks

OPSET = 17


class Graph:
    """An ONNX graph under construction; values are named by number."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its result."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{op}{len(self.nodes)}", **attributes))
        return name

    def weight(self, x: Any) -> str:
        """Add a constant and return its name."""
        from onnx import numpy_helper

        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(x), name))
        return name

    def dense(self, params: Params, x: str) -> str:
        """Add `x @ kernel + bias`."""
        return self.add("Add", self.add("MatMul", x, self.weight(params["kernel"])), self.weight(params["bias"]))

    def conv(self, params: Params, x: str, stride: int = 1, groups: int = 1) -> str:
        """Add a convolution of images [n, c, h, w] with a kernel [h, w, in, out]."""
        kernel = np.asarray(params["kernel"]).transpose(3, 2, 0, 1)
        options = {"strides": [stride, stride], "auto_pad": "SAME_UPPER", "group": groups}
        return self.add("Conv", x, self.weight(kernel), self.weight(params["bias"]), **options)

    def pooled(self, x: str) -> str:
        """Add the mean over all pixels."""
        return self.add("ReduceMean", x, axes=[2, 3], keepdims=0)


def _mlp(graph: Graph, params: Params, x: str) -> str:
    *hidden, last = sorted(params)
    for name in hidden:
        x = graph.add("Relu", graph.dense(params[name], x))
    return graph.dense(params[last], x)


def _resnet18(graph: Graph, params: Params, x: str) -> str:
    x = graph.add("Relu", graph.conv(params["stem"], graph.add("Transpose", x, perm=[0, 3, 1, 2])))
    for name in sorted(name for name in params if name.startswith("block")):
        block = params[name]
        stride = 2 if "projection" in block else 1
        y = graph.conv(block["conv2"], graph.add("Relu", graph.conv(block["conv1"], x, stride)))
        shortcut = graph.conv(block["projection"], x, stride) if "projection" in block else x
        x = graph.add("Relu", graph.add("Add", y, shortcut))
    return graph.dense(params["head"], graph.pooled(x))


def _mobilenet(graph: Graph, params: Params, x: str) -> str:
    def relu6(x: str) -> str:
        return graph.add("Clip", x, graph.weight(np.float32(0)), graph.weight(np.float32(6)))

    x = relu6(graph.conv(params["stem"], graph.add("Transpose", x, perm=[0, 3, 1, 2]), 2))
    for index, (inputs, inside, outputs, stride) in enumerate(bottlenecks()):
        block = params[f"block{index}"]
        y = relu6(graph.conv(block["expand"], x)) if "expand" in block else x
        y = graph.conv(block["project"], relu6(graph.conv(block["depthwise"], y, stride, inside)))
        x = graph.add("Add", x, y) if stride == 1 and inputs == outputs else y
    return graph.dense(params["head"], graph.pooled(relu6(graph.conv(params["last"], x))))


GRAPHS: dict[str, Callable[[Graph, Params, str], str]] = {"mlp": _mlp, "resnet18": _resnet18, "mobilenet": _mobilenet}


def int8_call(name: str, params: Params, x: jax.Array) -> Callable[[], np.ndarray]:
    """Return a call of a model's int8 program in ONNX Runtime, on as many threads as there are cores.

    Raises `KeyError` for a model that has no graph here.
    """
    import onnxruntime
    from onnxruntime import quantization

    data = np.asarray(x)
    with tempfile.TemporaryDirectory() as folder:
        plain, served = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        plain.write_bytes(_model(name, params, data))
        quantization.quantize_static(plain, served, _Once(data), per_channel=True)
        session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": data})[0]


def _model(name: str, params: Params, data: np.ndarray) -> bytes:
    from onnx import TensorProto, helper

    graph = Graph()
    result = GRAPHS[name](graph, params, "x")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, data.shape)
    y = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
    made = helper.make_graph(graph.nodes, name, [x], [y], graph.weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8).SerializeToString()


class _Once:
    """Calibration data: one batch."""

    def __init__(self, data: np.ndarray):
        self.batches = iter([{"x": data}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)
