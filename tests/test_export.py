"""Exported programs: the bits of `quantize`, any batch, and a process that has no jaxq."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxq

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "conv": jax.random.normal(KEYS[0], (3, 3, 4, 8)),
    "up": {"kernel": jax.random.normal(KEYS[1], (128, 64)), "bias": jnp.linspace(-1, 1, 64)},
    "head": jax.random.normal(KEYS[2], (64, 10)),
}
X = jax.random.normal(KEYS[3], (6, 4, 4, 4))


def f(params, x, activate=True):
    x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = x.reshape(x.shape[0], -1) @ params["up"]["kernel"] * 0.1 + params["up"]["bias"][None]
    x = jax.nn.gelu(x) if activate else x
    return {"logits": jax.nn.log_softmax(x @ params["head"]), "first": x[:, 0]}


POLICIES = {
    "dynamic": jaxq.w8a8(),
    "static": jaxq.w8a8(static=True),
    "mixed": {"up": jaxq.weight_only(jaxq.int4(group=32)), "conv": jaxq.weight_only(jaxq.kmeans(16)), "head": None},
}


@pytest.fixture(scope="module", params=POLICIES)
def exported(request, tmp_path_factory):
    """Return the saved artifact, and what `quantize` gives."""
    plan = jaxq.make_plan(f, POLICIES[request.param])(PARAMS, X)
    plan = jaxq.calibrate(f, plan, progress=False)(PARAMS, [X]) if plan.unobserved() else plan
    qparams = jaxq.convert(f, plan)(PARAMS, X)
    path = tmp_path_factory.mktemp("export") / "model.stablehlo"
    jaxq.export(f, plan, qparams, X, False, verify=(X, False)).save(path)
    return path, jax.jit(lambda p, x: jaxq.quantize(f, plan)(p, x, False))(qparams, X)


WITHOUT = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "jaxq":
            raise ImportError("jaxq is not here")
sys.meta_path.insert(0, Block())
import jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
out = program.call(np.load(sys.argv[2]))
assert program.call(np.load(sys.argv[2])[:1])["logits"].shape == (1, 10)
assert "jaxq" not in sys.modules
np.savez(sys.argv[3], **out)
"""


def test_artifacts_run_where_jaxq_is_not_and_give_the_same_bits(exported, tmp_path):
    path, want = exported
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-c", WITHOUT, path, tmp_path / "x.npy", tmp_path / "out.npz"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    got = np.load(tmp_path / "out.npz")
    assert np.isfinite(want["logits"]).all()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


BESIDE = """
import json, sys
sys.modules["jaxq"] = None
import jax.export, numpy as np
data = open(sys.argv[2], "rb").read()
start = 8 + int.from_bytes(data[:8], "little")
kinds = {"I8": np.int8, "U8": np.uint8, "F32": np.float32}
weights = {
    name: np.frombuffer(data[start:][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"])
    for name, entry in json.loads(data[8:start]).items()
    if not name.startswith("__")
}
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.savez(sys.argv[4], **program.call(weights, np.load(sys.argv[3])))
"""


def test_weights_beside_a_program_are_read_without_jaxq_and_can_be_others(tmp_path):
    plan = jaxq.make_plan(f, POLICIES["mixed"])(PARAMS, X)
    others = jax.tree.map(lambda w: w[::-1] * 0.5, PARAMS)
    first, second = (jaxq.convert(f, plan)(params, X) for params in (PARAMS, others))
    artifact = jaxq.export(f, plan, first, X, False, inside=False, verify=(X, False))
    path, x = tmp_path / "model.stablehlo", tmp_path / "x.npy"
    artifact.save(path)
    assert jaxq.load(path.with_name("model.stablehlo.safetensors"))[1] == plan
    assert len(artifact.data) < 200_000 and artifact.about["inputs"] == ["float32[batch,4,4,4]"]
    want = [jax.jit(lambda p, x: jaxq.quantize(f, plan)(p, x, False))(q, X) for q in (first, second)]
    np.save(x, X)
    command = [
        sys.executable,
        "-c",
        BESIDE,
        path,
        path.with_name("model.stablehlo.safetensors"),
        x,
        tmp_path / "out.npz",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz") as got:
        for name, array in want[0].items():
            np.testing.assert_array_equal(got[name], array)
    jaxq.save(path.with_name("model.stablehlo.safetensors"), second, plan)
    got = jaxq.Artifact.load(path).call(X)
    np.testing.assert_array_equal(got["logits"], want[1]["logits"])
    jaxq.save(path.with_name("model.stablehlo.safetensors"), {**second, "head": second["head"].T}, plan)
    with pytest.raises(jaxq.FileError, match=r"model\.stablehlo\.safetensors: these are not the weights"):
        jaxq.Artifact.load(path)
    path.with_name("model.stablehlo.safetensors").unlink()
    with pytest.raises(jaxq.FileError, match=r"model\.stablehlo\.safetensors: there is no such file"):
        jaxq.Artifact.load(path)


def test_programs_side_by_side_have_weights_of_their_own(tmp_path):
    """Also through links; parameters of 4 bits among them."""
    params = [{"w": jnp.full((8, 4), n), "e": jnp.asarray([1, -2, 7], jnp.int4)} for n in (1.0, 2.0)]
    g = lambda p, x: x @ p["w"] + p["e"].astype(jnp.float32).sum()  # noqa: E731
    x = jnp.ones((2, 8))
    plan = jaxq.make_plan(g, jaxq.w8a8())(params[0], x)
    for n, p in enumerate(params):
        jaxq.export(g, plan, jaxq.convert(g, plan)(p, x), x, inside=False).save(tmp_path / f"m.v{n}")
    (tmp_path / "latest").symlink_to("m.v1")
    for name, p in (("m.v0", params[0]), ("m.v1", params[1]), ("latest", params[1])):
        np.testing.assert_array_equal(jaxq.Artifact.load(tmp_path / name).call(x), jaxq.qat(g, plan)(p, x))
    with pytest.raises(TypeError, match="give the Plan"):
        jaxq.export(g, jaxq.w8a8(), params[0], x, inside=False)


def test_artifacts_say_who_can_read_them(exported):
    artifact = jaxq.Artifact.load(exported[0])
    about = artifact.about
    low, high = (
        jax.export.minimum_supported_calling_convention_version,
        jax.export.maximum_supported_calling_convention_version,
    )
    assert low <= about["calling_convention"] <= high and about["jax"] == jax.__version__
    assert about["inputs"] == ["float32[batch,4,4,4]"] and about["platforms"] == ["cpu", "cuda", "tpu"]
    assert set(jax.export.deserialize(bytearray(artifact.data)).platforms) == {"cpu", "cuda", "tpu"}


def test_broken_artifacts_are_refused(exported, tmp_path):
    data = exported[0].read_bytes()
    for bad in (data[:-1], data[:500] + b"x" + data[501:], data.replace(b"six", b"ten"), b"", b"text"):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(jaxq.FileError, match="bad: "):
            jaxq.Artifact.load(tmp_path / "bad")


def test_a_difference_is_found():
    plan = jaxq.make_plan(f, None)(PARAMS, X)
    calls = []

    def fickle(params, x):
        calls.append(x)
        return x * len(calls)

    with pytest.raises(ValueError, match="output 0 of the exported program is not that"):
        jaxq.export(fickle, plan, {}, X, platforms=("cpu",), verify=X + 1)


def test_shapes_are_taken_as_they_are():
    plan = jaxq.make_plan(f, jaxq.w8a8())(PARAMS, X)
    artifact = jaxq.export(f, plan, PARAMS, jax.ShapeDtypeStruct(X.shape, X.dtype), platforms=("cpu",))
    assert artifact.about["inputs"] == ["float32[6,4,4,4]"]


def test_programs_with_state_are_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.norm, self.up = nnx.BatchNorm(8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.up(self.norm(x))

    def run(module, x):
        return module(x)

    module, x = Model(), jnp.ones((2, 8))
    plan = jaxq.make_plan(run, jaxq.w8a8())(module, x)
    with pytest.raises(ValueError, match=r"module\.eval\(\)"):
        jaxq.export(run, plan, module, x, platforms=("cpu",))
    module.eval()
    jaxq.export(run, plan, jaxq.convert(run, plan)(module, x), x, platforms=("cpu",), verify=x)


def test_depthwise_convolutions_are_exported_in_their_form():
    """Of a symbolic batch too: not as a convolution for every channel."""

    def f(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=layout, feature_group_count=16
        )

    params, x = {"k": jnp.ones((3, 3, 1, 16))}, jnp.ones((2, 5, 5, 16))
    plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    artifact = jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, platforms=("cpu",), verify=x)
    assert "stablehlo.convolution" not in jax.export.deserialize(bytearray(artifact.data)).mlir_module()
