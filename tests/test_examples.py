"""The example: its data files, its models, its counting of products, and a short run from end to end."""

import gzip
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from PIL import Image

from zoo.entry import drawn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import char_transformer
import datasets
import integer_only
import low_bits
import low_bits_table
import train_qat
from hlo import count_ops
from models import MODELS, init_linen, init_nnx

# --- data files ------------------------------------------------------------------------------------------------------

N_TRAIN, N_TEST = 12, 7


def idx(array):
    """An IDX file's bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def images_and_labels(n, shape, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n, np.uint8)


def write_mnist(folder, *, compress=False):
    """Write a tiny MNIST into `folder` and return `{file name: array}`."""
    folder.mkdir(parents=True)
    arrays = {}
    for part, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"] = images_and_labels(n, (5, 4), n)
    for name, array in arrays.items():
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return arrays


def write_cifar10(folder):
    """Write a tiny CIFAR-10 into `folder` and return its images and labels, training part first."""
    folder.mkdir(parents=True)
    parts = []
    for files, labels_file, n in (
        ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json", 2),
        (["test_batch.png"], "test_lables.json", 3),
    ):
        images, labels = images_and_labels(n * len(files), (32, 32, 3), n)
        for file, rows in zip(files, np.split(images, len(files)), strict=True):
            Image.fromarray(rows.reshape(n, 1024, 3)).save(folder / file)
        (folder / labels_file).write_text(json.dumps(labels.tolist()))
        parts += [images, labels]
    return parts


@pytest.mark.parametrize(
    ("name", "folder", "compress"),
    [
        ("mnist", "mnist/package/data", False),
        ("mnist", "mnist", True),
        ("mnist", ".", False),
        ("fashion_mnist", "fashion_mnist/usr/share/datasets/fashion-mnist", True),
    ],
)
def test_idx_datasets_are_read_exactly(tmp_path, name, folder, compress):
    arrays = write_mnist(tmp_path / "data" / folder, compress=compress)
    data = datasets.load(name, tmp_path / "data")
    for part, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
        assert x.dtype == np.float32 and y.dtype == np.int32
        np.testing.assert_array_equal(np.rint(x[..., 0] * 255), arrays[f"{part}-images-idx3-ubyte"])
        np.testing.assert_array_equal(y, arrays[f"{part}-labels-idx1-ubyte"])
    assert data.train_x.shape == (N_TRAIN, 5, 4, 1) and data.test_x.shape == (N_TEST, 5, 4, 1)


def test_cifar10_is_read_exactly(tmp_path):
    written = write_cifar10(tmp_path / "cifar10" / "package")
    data = datasets.load("cifar10", tmp_path)
    assert data.train_x.shape == (10, 32, 32, 3) and data.train_x.dtype == np.float32
    for read, array in zip(data[:4], written, strict=True):
        np.testing.assert_array_equal(np.rint(read * 255) if read.ndim == 4 else read, array)


def test_digits_are_split_once_and_for_all():
    data = datasets.load("digits")
    assert data.train_x.shape == (1437, 8, 8, 1) and data.test_x.shape == (360, 8, 8, 1)
    assert data.train_x.min() == 0 and data.train_x.max() == 1
    np.testing.assert_array_equal(data.test_y[:10], [2, 8, 2, 6, 6, 7, 1, 9, 8, 5])


IDX_DAMAGE = {
    "not an IDX file": lambda data: b"\x00\x00\x09" + data[3:],
    "not an IDX file of 1": lambda data: data[:3] + b"\x03" + data[4:],
    "starts with b''": lambda data: b"",
    "18 bytes, but shape \\(12,\\) needs 20": lambda data: data[:-2],
    "labels from .* to 200": lambda data: data[:-1] + bytes([200]),
    "11 labels for 12 images": lambda data: idx(np.zeros(11, np.uint8)),
}


@pytest.mark.parametrize("message", IDX_DAMAGE)
def test_a_damaged_idx_file_is_named(tmp_path, message):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    path.write_bytes(IDX_DAMAGE[message](path.read_bytes()))
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte.*{message}"):
        datasets.load("mnist", tmp_path)


GZIP_DAMAGE = [lambda data: data[:-9], lambda data: b"no gzip", lambda data: data[:20] + data[30:]]


@pytest.mark.parametrize("damage", GZIP_DAMAGE, ids=["cut", "text", "gap"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    write_mnist(tmp_path / "mnist", compress=True)
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: not a whole gzip file"):
        datasets.load("mnist", tmp_path)


CIFAR_DAMAGE = {
    ("data_batch_3.png", "not a whole PNG image"): lambda path: path.write_bytes(path.read_bytes()[:500]),
    ("data_batch_2.png", "not a whole PNG"): lambda path: path.write_bytes(b"text"),
    ("test_batch.png", "expected uint8"): lambda path: Image.new("RGB", (1000, 3)).save(path),
    ("data_batch_1.png", "expected uint8"): lambda path: Image.new("L", (1024, 2)).save(path),
    ("test_lables.json", "not JSON"): lambda path: path.write_text("[1, 2"),
    ("train_lables.json", "expected a list of integers"): lambda path: path.write_text('{"0": 1}'),
    ("train_lables.json", "3 labels for 10 images"): lambda path: path.write_text("[1, 2, 3]"),
    ("test_lables.json", "labels from -1 to 2"): lambda path: path.write_text("[-1, 2, 0]"),
}


@pytest.mark.parametrize(("file", "message"), CIFAR_DAMAGE)
def test_a_damaged_cifar10_file_is_named(tmp_path, file, message):
    write_cifar10(tmp_path / "cifar10")
    CIFAR_DAMAGE[file, message](tmp_path / "cifar10" / file)
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        datasets.load("cifar10", tmp_path)


def test_missing_files_are_listed_with_the_layout(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="missing in .*: t10k-labels-idx1-ubyte\n") as caught:
        datasets.load("mnist", tmp_path)
    assert "DIR/mnist/package/data/\n    train-images-idx3-ubyte" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no files of cifar10 under"):
        datasets.load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datasets.load("cifar10", tmp_path / "nowhere")


# --- models ----------------------------------------------------------------------------------------------------------

SHAPE = (8, 8, 1)


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize("name", MODELS)
def test_linen_and_nnx_agree(name):
    """The same parameter paths and, given the same parameters, the same logits."""
    model = MODELS[name].linen(10)
    variables = drawn(jax.eval_shape(lambda: init_linen(name, SHAPE, 10, seed=1)[1]))
    module = nnx.eval_shape(lambda: init_nnx(name, SHAPE, 10, seed=2))
    leaves = {name_of(path[1:]): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    assert sorted(leaves) == sorted(name_of(path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(module))
    module = jax.tree_util.tree_map_with_path(lambda path, _: leaves[name_of(path[:-1])], module)
    x = np.random.default_rng(0).random((3, *SHAPE), np.float32)
    logits = jax.jit(lambda module, x: module(x))(module, x)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, x), rtol=1e-4, atol=1e-5)


def test_the_cnn_is_small():
    variables = jax.eval_shape(lambda: init_linen("cnn", (28, 28, 1), 10, seed=0)[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) <= 100_000


# --- counting products -----------------------------------------------------------------------------------------------


def int8_dot(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def conv(x, w, dtype):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, preferred_element_type=dtype)


def counted(f, *args):
    """Counts in the lowered and in the compiled program: int8 dots, int8 convs, float dots, float convs."""
    lowered = jax.jit(f).lower(*args)
    return [tuple(count_ops(text).values()) for text in (lowered.as_text(), lowered.compile().as_text())]


X8, W8 = np.ones((64, 128), np.int8), np.ones((128, 128), np.int8)
IMAGE8, KERNEL8 = np.ones((2, 8, 8, 16), np.int8), np.ones((3, 3, 16, 16), np.int8)
X, W, IMAGE, KERNEL = (array.astype(np.float32) for array in (X8, W8, IMAGE8, KERNEL8))


def test_count_ops_tells_integer_from_float():
    assert counted(int8_dot, X8, W8) == [(1, 0, 0, 0)] * 2
    assert counted(jnp.dot, X, W) == [(0, 0, 1, 0)] * 2
    assert counted(lambda x, w: conv(x, w, jnp.int32), IMAGE8, KERNEL8) == [(0, 1, 0, 0)] * 2
    assert counted(lambda x, w: conv(x, w, jnp.float32), IMAGE, KERNEL) == [(0, 0, 0, 1)] * 2
    assert counted(jnp.add, X, X) == [(0, 0, 0, 0)] * 2


def test_count_ops_looks_into_functions_loops_and_branches():
    dot = jax.jit(int8_dot)

    def f(x, w, y):
        x = dot(dot(x, w).astype(jnp.int8), w).astype(jnp.int8)
        y = lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ y), y)
        return dot(x, w), lax.cond(y.sum() > 0, lambda y: y @ y, lambda y: y, y)

    assert counted(f, X8, W8, W) == [(3, 0, 2, 0)] * 2


GPU_HLO = """HloModule jit_f, entry_computation_layout={(s8[4,8]{1,0})->f32[4,8]{1,0}}

%gemm (p0: s8[4,8], p1: s8[8,8]) -> s32[4,8] {
  %p0 = s8[4,8]{1,0} parameter(0)
  %p1 = s8[8,8]{1,0} parameter(1)
  ROOT %dot.1 = s32[4,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, metadata={op_name="jit(f)/dot_general"}
}

ENTRY %main (a: s8[4,8], b: s8[8,8]) -> f32[4,8] {
  %a = s8[4,8]{1,0:T(8,128)(4,1)} parameter(0)
  %b = s8[8,8]{1,0} parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %fusion = s32[4,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm
  %again = s32[4,8]{1,0} fusion(%fusion, %b), kind=kCustom, calls=%gemm
  %c = (f32[1,4,8]{2,1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="__cudnn$convForward"
  %d = (f32[4,8]{1,0}, s8[256]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %e = f32[4,8]{1,0} custom-call(f32[4,8]{1,0} %x, f32[4,8]{1,0} %x), custom_call_target="__onednn$matmul"
  ROOT %t = f32[4,8]{1,0} custom-call(%x), custom_call_target="TopK"
}
"""


def test_count_ops_reads_library_calls():
    assert count_ops(GPU_HLO) == {"int8_dots": 2, "int8_convs": 1, "float_dots": 2, "float_convs": 0}


def test_count_ops_refuses_other_text():
    with pytest.raises(ValueError, match="no program found"):
        count_ops("a poem")


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--framework", "linen"], ["--framework", "nnx", "--static"]], ids=" ".join)
def test_the_example_runs(tmp_path, capsys, options):
    file = tmp_path / "result.json"
    result = train_qat.main(["--epochs", "1", "--qat-epochs", "1", "--json", str(file), *options])
    assert json.loads(file.read_text()) == result
    assert result["int8_differs_from_qat"] == 0 and result["largest_logit_difference"] == 0
    assert min(result["accuracy"].values()) > 0.6
    assert result["bytes"]["int8"] < 0.35 * result["bytes"]["float"]
    for counts in result["products"]["int8"].values():
        assert counts["int8_dots"] + counts["int8_convs"] == 4  # a convolution may run as a dot over patches
        assert counts["float_dots"] == counts["float_convs"] == 0
    printed = capsys.readouterr().out
    assert "conv_0" in printed and "latency of 64 images" in printed


@pytest.mark.long
def test_the_example_of_few_bits_runs_and_is_drawn(tmp_path, capsys):
    options = ["--bits", "2", "--epochs", "1", "--qat-epochs", "1", "--out", str(tmp_path / "runs")]
    (result,) = low_bits.main(options)
    assert result["bits"] == "2" and 0 <= result["quantized"] <= 1 and len(result["curve"]) == 1
    assert low_bits.main(options) == [result]  # read back, not run again
    low_bits_table.main([str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert "| digits | 2 |" in capsys.readouterr().out
    assert {file.name for file in tmp_path.glob("low_bits*")} == {"low_bits.md", "low_bits.png", "low_bits_curves.png"}
    (tmp_path / "low_bits.png").unlink()
    low_bits_table.main(["--table", str(tmp_path / "low_bits.md")])
    assert (tmp_path / "low_bits.png").exists()


@pytest.mark.long
def test_a_float_model_of_few_bits_is_trained_once(tmp_path):
    first, second = (
        low_bits.main(
            ["--task", "digits_rows", "--bits", bits, "--epochs", "1", "--qat-epochs", "1", "--out", str(tmp_path)]
        )
        for bits in ("8", "4")
    )
    assert first[0]["float_curve"] == second[0]["float_curve"]
    assert {file.name for file in tmp_path.glob("*float*")} == {
        f"digits_rows-float-0.{e}" for e in ("json", "safetensors")
    }


@pytest.mark.long
def test_the_character_transformer_runs_and_is_drawn(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 100)
    options = ["--text", str(text), "--steps", "20", "--qat-steps", "4", "--out", str(tmp_path / "runs")]
    results = char_transformer.main(options)
    assert [r["method"] for r in results] == ["W8A8", "W4A8", "b1.58"]
    assert all(r["bytes"][1] < 0.5 * r["bytes"][0] and abs(r["quantized"] - r["float"]) < 0.5 for r in results)
    assert "| b1.58 | 20 + 20 | 0 |" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "runs").iterdir()}
    assert names == {
        "char_transformer.md",
        "char_transformer.png",
        *(f"char-{m}-0.json" for m in char_transformer.METHODS),
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--data", "nowhere"], "no such file"), (["--methods", "W9A9"], "no W9A9; there are W8A8, W4A8, b1.58")],
)
def test_wrong_options_of_the_character_transformer_are_explained(capsys, argv, message):
    with pytest.raises(SystemExit):
        char_transformer.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_the_example_without_floats_runs(capsys):
    results = integer_only.main(["--epochs", "3"])
    assert [result.task for result in results] == ["digits", "digits_rows"]
    for result in results:
        assert result.agreement > 0.99 and abs(result.accuracies[2] - result.accuracies[0]) < 0.01
    assert "integers alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "mnist"], "mnist needs a folder"),
        (["--dataset", "cifar10", "--data", "nowhere"], "no such folder: nowhere"),
        (["--batch", "5000"], "--batch 5000 is more than the 1437 training images"),
        (["--batch", "0"], "0 is less than 1"),
        (["--json", "nowhere/result.json"], "--json: no such folder: nowhere"),
        (["--model", "rnn"], "invalid choice"),
    ],
)
def test_wrong_options_are_explained(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        train_qat.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
