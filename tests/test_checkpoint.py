"""Save and load: bit for bit, in every format, one file or many, whole or not at all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxq
import zoo
from jaxq.io import checkpoint
from jaxq.numbers.qarray import is_converted

QUANTIZERS = {
    "int8": jaxq.int8(),
    "int8_zero": jaxq.int8(symmetric=False),
    "uint8": jaxq.uint8(),
    "int16": jaxq.int16(),
    "int4": jaxq.int4(group=16),
    "int3": jaxq.Quantizer(jaxq.Int(3)),
    "int2": jaxq.int2(),
    "one_bit": jaxq.binary(),
    "ternary": jaxq.ternary(),
    "fixed": jaxq.fixed(8, 6),
    "fixed4": jaxq.fixed(4, 2),
    "kmeans": jaxq.kmeans(16),
    "kmeans5": jaxq.kmeans(5, group=32),
    "nf4": jaxq.nf4(16),
    "float8": jaxq.float8(),
    "e5m2": jaxq.float8_e5m2(),
    "float16": jaxq.float16(),
    "bfloat16": jaxq.bfloat16(),
    "mxfp8": jaxq.mxfp8(),
    "mxfp6": jaxq.mxfp6(),
    "mxfp4": jaxq.mxfp4(),
    "mxint8": jaxq.mxint8(),
    "nvfp4": jaxq.nvfp4(),
}
PLAIN = {
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f8": jnp.float8_e4m3fn,
    "e8m0": jnp.float8_e8m0fnu,
    "i4": jnp.int4,
    "u2": jnp.uint2,
    "i32": jnp.int32,
    "bool": jnp.bool_,
    "c64": jnp.complex64,
}


def every(params, x):
    return sum(x @ params[name] for name in QUANTIZERS)


@dataclasses.dataclass(frozen=True)
class Saved:
    """Parameters in every format, their plan, and the input of their function."""

    qparams: dict
    plan: jaxq.Plan
    x: jax.Array


@pytest.fixture(scope="module")
def saved() -> Saved:
    keys = jax.random.split(jax.random.key(0), len(QUANTIZERS))
    params = {name: jax.random.normal(key, (64, 24)) for name, key in zip(QUANTIZERS, keys, strict=True)}
    x = jax.random.normal(jax.random.key(1), (3, 64))
    static = jaxq.int8(per_tensor=True, calibrator=jaxq.mse())
    policy = {name: jaxq.Scheme(weight=q) for name, q in QUANTIZERS.items()}
    policy["int8"] = jaxq.Scheme(jaxq.int8(), static, out=static)
    plan = jaxq.calibrate(every, policy, progress=False)(params, [x])
    plain = {name: jnp.array([0, 1, 1], kind) for name, kind in PLAIN.items()}
    return Saved(jaxq.convert(every, plan)(params, x) | {"plain": plain}, plan, x)


def assert_same(got, want):
    """Assert that two trees hold the same bits, formats and types."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b) and (not isinstance(a, jax.Array) or a.dtype == b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("shard_bytes", [None, 5000])
def test_every_format_comes_back_bit_for_bit(saved, tmp_path, shard_bytes):
    jaxq.save(tmp_path / "model", saved.qparams, saved.plan, shard_bytes=shard_bytes)
    qparams, plan = jaxq.load(tmp_path / "model")
    assert plan == saved.plan
    assert_same(qparams, saved.qparams)
    if shard_bytes:
        assert len(list((tmp_path / "model").iterdir())) > 5
    else:
        got, want = (jaxq.quantize(every, plan)(p, saved.x) for p in (qparams, saved.qparams))
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(got, want)


def test_the_safetensors_package_reads_the_same_arrays(saved, tmp_path):
    jaxq.save(tmp_path / "model", saved.qparams, saved.plan)
    with safetensors.safe_open(tmp_path / "model", "numpy") as file:
        assert json.loads(file.metadata()["tree"])["type"] == "dict"
        for name in ("int4.stored", "int4.scale", "kmeans.table", "plain/i32"):
            head, _, part = name.rpartition("." if "." in name else "/")
            want = getattr(saved.qparams[head], part) if "." in name else saved.qparams[head][part]
            np.testing.assert_array_equal(file.get_tensor(name), want)


def test_files_of_the_safetensors_package_are_read(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.array(2.5), "c": np.zeros((0, 3), np.uint8)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"k": "v"})
    container = checkpoint.read_container(tmp_path / "x.safetensors")
    assert container.metadata == {"k": "v"} and container.checksum is None
    assert container.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(container.arrays[name], array, strict=True)


@pytest.mark.parametrize("name", ["nnx_mlp", "weight_norm", "scan_xs"])
def test_models_come_back_in_their_own_types(name, tmp_path):
    entry = zoo.model(name)
    plan = jaxq.make_plan(entry.fn, jaxq.w8a8())(entry.params, *entry.args)
    qparams = jaxq.convert(entry.fn, plan)(entry.params, *entry.args)
    jaxq.save(tmp_path / "model", qparams, plan)
    loaded, _ = jaxq.load(tmp_path / "model", like=jax.eval_shape(lambda: entry.params))
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(qparams))
    assert jax.tree.structure(loaded, is_leaf=is_converted) == jax.tree.structure(qparams, is_leaf=is_converted)
    nested, _ = jaxq.load(tmp_path / "model")
    assert type(nested) is dict
    assert sorted(map(bits, jax.tree.leaves(nested))) == sorted(map(bits, jax.tree.leaves(qparams)))


def bits(leaf) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def test_weights_in_several_arguments_and_in_a_tuple(tmp_path):
    def several(up, x, head):
        return x @ up["params"]["w"] @ head["w"]

    def one(params, x):
        return x @ params[0] @ params[1]["w"]

    up, head, x = {"params": {"w": jnp.eye(8)}}, {"w": jnp.ones((8, 3))}, jnp.ones((2, 8))
    plan = jaxq.make_plan(several, jaxq.w8a8(), argnums=(0, 2))(up, x, head)
    qparams = jaxq.convert(several, plan, argnums=(0, 2))(up, x, head)
    jaxq.save(tmp_path / "several", qparams, plan)
    loaded, _ = jaxq.load(tmp_path / "several")
    got = jaxq.quantize(several, plan, argnums=(0, 2))(loaded[0], x, loaded[1])
    np.testing.assert_array_equal(got, jaxq.qat(several, plan, argnums=(0, 2))(up, x, head))
    export = jaxq.export(several, plan, loaded, x, platforms=("cpu",), argnums=(0, 2), verify=x)
    np.testing.assert_array_equal(export.call(x), got)

    params = (jnp.eye(8), {"w": jnp.ones((8, 3))})
    plan = jaxq.make_plan(one, jaxq.w8a8())(params, x)
    jaxq.save(tmp_path / "one", jaxq.convert(one, plan)(params, x), plan)
    np.testing.assert_array_equal(jaxq.quantize(one, plan)(jaxq.load(tmp_path / "one")[0], x), got)


def test_plain_values_and_code_come_back(tmp_path):
    values = {3: [True, -7, 2.5, float("inf"), "text", None, ()]}
    params = {"w": jnp.eye(4), "values": values, "f": jnp.tanh, "k": jax.random.key(3)}
    plan = jaxq.make_plan(lambda p, x: x @ p["w"], None)(params, jnp.ones((1, 4)))
    jaxq.save(tmp_path / "m", params, plan)
    with pytest.raises(jaxq.FileError, match="like="):
        jaxq.load(tmp_path / "m")
    loaded, _ = jaxq.load(tmp_path / "m", like=params)
    assert loaded["values"] == values and loaded["f"] is jnp.tanh
    assert jax.random.key_data(loaded["k"]).tolist() == jax.random.key_data(params["k"]).tolist()


def test_numpy_scalars_are_kept(tmp_path):
    f, params = (lambda p, x: float(p["a"]) * (x @ p["w"])), {"a": np.float32(2), "w": jnp.eye(4)}
    plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 4)))
    jaxq.save(tmp_path / "model", jaxq.convert(f, plan)(params, jnp.ones((2, 4))), plan)
    assert float(jaxq.load(tmp_path / "model")[0]["a"]) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(tmp_path, bad):
    f, params = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}
    plan = jaxq.make_plan(f, jaxq.w8a8())(params, jnp.ones((2, 4)))
    q = jaxq.convert(f, plan)(params, jnp.ones((2, 4)))["w"]
    with pytest.raises(ValueError, match="NaN or infinity"):
        jaxq.save(tmp_path / "model", {"w": dataclasses.replace(q, scale=q.scale * bad)}, plan)
