"""compressed-tensors checkpoints: what is written, read by a decoder of this file's own; what others write, read."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import jaxq
from jaxq.io import compressed_reader

pytestmark = pytest.mark.shared

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "layer": {"up": {"kernel": jax.random.normal(KEYS[0], (64, 20)), "bias": jnp.arange(20.0)}},
    "head": jax.random.normal(KEYS[1], (6, 20)),
}
X = jax.random.normal(KEYS[2], (5, 64))


def f(params, x):
    x = jnp.tanh(x @ params["layer"]["up"]["kernel"] + params["layer"]["up"]["bias"][None])
    return x @ params["head"].T  # a leaf [outputs, inputs]


def made(policy):
    plan = jaxq.make_plan(f, policy)(PARAMS, X)
    plan = jaxq.calibrate(f, plan, progress=False)(PARAMS, [X]) if plan.unobserved() else plan
    return jaxq.convert(f, plan)(PARAMS, X), plan


def tensors(folder):
    """Return the arrays of a checkpoint, read by the safetensors package; float8 as ml_dtypes has it."""
    data = (folder / "model.safetensors").read_bytes()
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
    length = int.from_bytes(data[:8], "little")
    header, start = json.loads(data[8 : 8 + length]), 8 + length
    kinds = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "I8": "i1", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
    entries = {name: header[name] for name in names}
    return {
        name: np.frombuffer(
            data[start + e["data_offsets"][0] : start + e["data_offsets"][1]], kinds[e["dtype"]]
        ).reshape(e["shape"])
        for name, e in entries.items()
    }


def fields(packed, bits, axis, length):
    """Return signed codes from int32 words, one shift at a time."""
    words = np.moveaxis(packed, axis, -1).astype(np.int64) % 2**32
    codes = np.stack([words >> bits * n & 2**bits - 1 for n in range(32 // bits)], -1)
    codes = codes.reshape(*words.shape[:-1], -1)[..., :length] - 2 ** (bits - 1)
    return np.moveaxis(codes, -1, axis)


def decoded(arrays, module, scheme):
    """Return the weight of a module [outputs, inputs] in float64, as the format's documentation has it."""
    scale, args = arrays[f"{module}.weight_scale"].astype(np.float64), scheme["weights"]
    zero = np.zeros_like(scale)
    if scheme["format"] == "pack-quantized":
        rows, columns = arrays[f"{module}.weight_shape"]
        codes = fields(arrays[f"{module}.weight_packed"], args["num_bits"], 1, columns).astype(np.float64)
        if not args["symmetric"]:
            zero = fields(arrays[f"{module}.weight_zero_point"], args["num_bits"], 0, rows).astype(np.float64)
    else:
        codes = arrays[f"{module}.weight"].astype(np.float64)
    if args["strategy"] == "tensor":
        assert scale.shape == (1,)
        return codes * scale
    assert args["strategy"] == ("group" if args["group_size"] else "channel")
    repeats = args["group_size"] or codes.shape[1]
    assert scale.shape == (len(codes), codes.shape[1] // repeats)
    return (codes - np.repeat(zero, repeats, 1)) * np.repeat(scale, repeats, 1)


FLOAT8, STATIC = jaxq.float8(), jaxq.int8(per_tensor=True, calibrator=jaxq.minmax())
SCHEMES = {
    "int8": (jaxq.w8a8(), "int-quantized", ("int", 8, True, "channel", "token")),
    "int8 static": (jaxq.w8a8(static=True), "int-quantized", ("int", 8, True, "channel", "tensor")),
    "int4 groups": (jaxq.weight_only(jaxq.int4(group=4)), "pack-quantized", ("int", 4, True, "group", None)),
    "int4 zero points": (
        jaxq.weight_only(jaxq.int4(group=4, symmetric=False)),
        "pack-quantized",
        ("int", 4, False, "group", None),
    ),
    "int4": (jaxq.weight_only(jaxq.int4()), "pack-quantized", ("int", 4, True, "channel", None)),
    "int8 weights": (jaxq.weight_only(jaxq.int8()), "pack-quantized", ("int", 8, True, "channel", None)),
    "int8 per tensor": (
        jaxq.Uniform(jaxq.Scheme(jaxq.int8(per_tensor=True), jaxq.int8())),
        "int-quantized",
        ("int", 8, True, "tensor", "token"),
    ),
    "float8": (jaxq.Uniform(jaxq.Scheme(FLOAT8, FLOAT8)), "float-quantized", ("float", 8, True, "channel", "token")),
    "float8 weights": (jaxq.weight_only(FLOAT8), "float-quantized", ("float", 8, True, "channel", None)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_written_checkpoints_decode_and_come_back(name, tmp_path):
    policy, kind, (type_, bits, symmetric, strategy, acts) = SCHEMES[name]
    qparams, plan = made(policy)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    jaxq.save_compressed_tensors(tmp_path, qparams, plan)
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = config["quantization_config"]
    assert config["hidden_size"] == 64 and quantization["quant_method"] == "compressed-tensors"
    assert quantization["quantization_status"] == "compressed" and quantization["ignore"] == []
    (scheme,) = quantization["config_groups"].values()
    assert quantization["format"] == scheme["format"] == kind and scheme["targets"] == ["Linear"]
    weights, inputs = scheme["weights"], scheme["input_activations"]
    assert (weights["type"], weights["num_bits"], weights["symmetric"], weights["strategy"]) == (
        type_,
        bits,
        symmetric,
        strategy,
    )
    assert (inputs and (inputs["strategy"], inputs["dynamic"])) == (acts and (acts, acts == "token"))

    arrays, loaded = tensors(tmp_path), jaxq.load_compressed_tensors(tmp_path)
    np.testing.assert_array_equal(arrays["layer.up.bias"], np.arange(20.0, dtype=np.float32))
    for module, q in (("layer.up", qparams["layer"]["up"]["kernel"].transpose((1, 0))), ("head", qparams["head"])):
        np.testing.assert_allclose(decoded(arrays, module, scheme), q.decode(), rtol=1e-6)
        again = loaded[f"{module}.weight"]
        assert (again.format, again.dtype, again.shape) == (q.format, q.dtype, q.shape)
        for a, b in ((again.codes, q.codes), (again.scale, q.scale), (again.zero_point, q.zero_point)):
            np.testing.assert_array_equal(a, b)
    if acts == "tensor":
        want = np.abs(np.asarray(X)).max() / 127
        np.testing.assert_allclose(arrays["layer.up.input_scale"], [want], rtol=1e-6)


def test_schemes_mix_and_float_layers_are_named(tmp_path):
    deep = {"a": X.T @ X, "b": X.T @ X + 1, "c": X.T @ X + 2}
    policy = {"a": jaxq.w8a8(), "b": jaxq.weight_only(jaxq.int4(group=16)), "c": None}

    def chain(params, x):
        return x @ params["a"] @ params["b"] @ params["c"]

    plan = jaxq.make_plan(chain, policy)(deep, X)
    jaxq.save_compressed_tensors(tmp_path, jaxq.convert(chain, plan)(deep, X), plan)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert config["format"] == "mixed-precision" and config["ignore"] == ["c"]
    assert {(group["format"], *group["targets"]) for group in groups} == {
        ("int-quantized", "a"),
        ("pack-quantized", "b"),
    }
    loaded = jaxq.load_compressed_tensors(tmp_path)
    assert str(loaded["a.weight"].format) == "int8" and str(loaded["b.weight"].format) == "int4"
    np.testing.assert_array_equal(loaded["c"], deep["c"])


@pytest.mark.parametrize("quantizer", [jaxq.int8(), jaxq.int4(group=4), jaxq.int8(per_tensor=True)], ids=repr)
def test_kernels_of_more_axes_are_matrices_of_all_outputs_by_all_inputs(quantizer, tmp_path):
    heads = {"query": jax.random.normal(KEYS[0], (64, 2, 8)), "out": jax.random.normal(KEYS[1], (2, 8, 20))}

    def attention(params, x):
        x = jax.lax.dot_general(x, params["query"], (((1,), (0,)), ((), ())))
        return jax.lax.dot_general(x, params["out"], (((1, 2), (0, 1)), ((), ())))

    plan = jaxq.make_plan(attention, jaxq.Scheme(quantizer, None if quantizer.group else jaxq.int8()))(heads, X)
    qparams = jaxq.convert(attention, plan)(heads, X)
    jaxq.save_compressed_tensors(tmp_path, qparams, plan)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    arrays, (scheme,) = tensors(tmp_path), config["config_groups"].values()
    want = {"query": np.asarray(qparams["query"].decode()).reshape(64, 16).T}
    want["out"] = np.asarray(qparams["out"].decode()).reshape(16, 20).T
    for module, matrix in want.items():
        np.testing.assert_allclose(decoded(arrays, module, scheme), matrix, rtol=1e-6)


def test_words_are_those_of_the_documentation(tmp_path):
    # compressed_tensors, pack_to_int32: [1, 2] -> [129, 130] -> 33409.
    write(tmp_path, {"m.weight_packed": np.array([[33409]], np.int32), "m.weight_shape": np.array([1, 2])}, bits=8)
    assert jaxq.load_compressed_tensors(tmp_path)["m.weight"].codes.tolist() == [[1, 2]]


def write(folder, arrays, bits=4, targets=("Linear",)):
    """Write a checkpoint as others do."""
    group = {"weights": {"num_bits": bits, "symmetric": True}, "targets": list(targets)}
    config = {"quantization_config": {"config_groups": {"group_0": group, "other": {**group, "targets": ["x"]}}}}
    config["quantization_config"]["config_groups"]["other"]["weights"] = {"num_bits": 3}
    if targets == ("Linear",):
        del config["quantization_config"]["config_groups"]["other"]
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {"m.weight_scale": np.ones((1, 1), np.float32), **arrays}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def test_checkpoints_of_others_are_read(tmp_path):
    rng = np.random.default_rng(0)
    scale = rng.uniform(size=(5, 1)).astype(np.float16)
    codes = rng.integers(-128, 128, (5, 7), np.int8)
    arrays = {"m.weight": codes, "m.weight_scale": scale, "m.weight_zero_point": np.zeros((5, 1), np.int8)}
    write(tmp_path, arrays, bits=8, targets=(r"re:.*",))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    q = jaxq.load_compressed_tensors(tmp_path)["m.weight"]
    assert q.dtype == jnp.float16 and q.zero_point is None
    want = codes.astype(np.float64) * scale.astype(np.float64)
    np.testing.assert_allclose(np.asarray(q.decode(jnp.float32)), want, rtol=1e-6)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(jaxq.FileError, match="not the name of a file"):
        jaxq.load_compressed_tensors(tmp_path)


BROKEN = {
    "reordered groups": ({"m.weight_g_idx": np.zeros(2, np.int32), "m.weight": np.zeros((1, 2), np.int8)}, "actorder"),
    "another type": ({"m.weight": np.zeros((1, 2), np.int16)}, "int16"),
    "too few words": (
        {"m.weight_packed": np.zeros((1, 1), np.int32), "m.weight_shape": np.array([1, 900])},
        r"\[1, 1\] words",
    ),
    "no weight": ({"m.bias": np.zeros(2)}, "not a compressed-tensors"),
    "a scale of another shape": (
        {"m.weight": np.zeros((4, 2), np.int8), "m.weight_scale": np.ones((3, 1), np.float32)},
        "does not divide",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name, tmp_path):
    arrays, match = BROKEN[name]
    write(tmp_path, arrays)
    with pytest.raises(jaxq.FileError, match=match):
        jaxq.load_compressed_tensors(tmp_path)


def test_what_the_format_has_no_place_for_is_named(tmp_path):
    def conv(params, x):
        return jax.lax.conv(x, params["k"], (1, 1), "SAME")

    params, image = {"k": jnp.ones((2, 3, 3, 3))}, jnp.ones((1, 3, 8, 8))
    plan = jaxq.make_plan(conv, jaxq.w8a8())(params, image)
    with pytest.raises(ValueError, match="site 'k' is conv_general_dilated"):
        jaxq.save_compressed_tensors(tmp_path, jaxq.convert(conv, plan)(params, image), plan)
    experts = {"w": jnp.ones((3, 8, 4))}  # a product for each of them: no module
    plan = jaxq.make_plan(lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]), jaxq.w8a8())(experts, jnp.ones((3, 2, 8)))
    with pytest.raises(ValueError, match="'w' is dot_general.*without a batch"):
        jaxq.save_compressed_tensors(tmp_path, {"w": jaxq.int8()(experts["w"], (1,))}, plan)
    for policy, match in [
        (jaxq.weight_only(jaxq.fixed(8, 6)), "'layer/up' multiplies Q1.6"),
        (jaxq.Uniform(jaxq.Scheme(jaxq.int4(), jaxq.int8())), "'layer/up' multiplies int4 weights by int8"),
        (jaxq.Uniform(jaxq.Scheme(jaxq.int8(), STATIC, out=STATIC)), "'layer/up' rounds its output"),
        (None, "nothing is quantized"),
    ]:
        with pytest.raises(ValueError, match=match):
            jaxq.save_compressed_tensors(tmp_path, *made(policy))
    square = {"w": jnp.eye(8)}
    policy = jaxq.Uniform(jaxq.Scheme(jaxq.int8(per_tensor=True), jaxq.int8()))
    plan = jaxq.make_plan(lambda p, x: x @ p["w"], policy)(square, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="square with one scale"):
        jaxq.save_compressed_tensors(tmp_path, jaxq.convert(lambda p, x: x @ p["w"], plan)(square, X[:, :8]), plan)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_index_lists_other_files_is_refused(tmp_path):
    f, params, x = (lambda p, x: x @ p["up"]), {"up": jnp.eye(8)}, jnp.ones((2, 8))
    plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(jaxq.FileError, match="choose another folder"):
        jaxq.save_compressed_tensors(tmp_path, jaxq.convert(f, plan)(params, x), plan)


@pytest.mark.parametrize("pattern", ["(", "(a+)+$"])
def test_hostile_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern|repeats a group"):
        compressed_reader._fits(pattern, "a" * 40)
