"""`explain` and `tune`: what they say is what the compiler was given, and what was measured."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from inspection import assert_bitwise
from jaxq.measure import timing
from jaxq.measure.cost import Cost
from jaxq.measure.explanation import Explanation, Line

W8A8, STATIC = jaxq.w8a8(), jaxq.w8a8(static=True)
POLICY = {"head": None, "table": jaxq.weight_only(), "down": jaxq.weight_only(jaxq.int4()), "*": W8A8}


def network(params, x, indices, *, scale=1.0):
    """Run a convolution, two equal layers and a lookup; the last layer stays float."""
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params["stem"], (1, 1), "SAME", dimension_numbers=layout)
    y = jnp.mean(y, axis=(1, 2)) + jnp.take(params["table"], indices, axis=0)
    for name in ("up", "mid"):
        y = jnp.tanh(y @ params[name])
    return (y @ params["down"]) @ params["head"] * scale


SHAPES = {"stem": (3, 3, 3, 128), "table": (5, 128), "up": (128, 128), "mid": (128, 128), "down": (128, 64)}


@pytest.fixture(scope="module")
def call():
    shapes = {**SHAPES, "head": (64, 4)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    params = {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    return params, jax.random.normal(jax.random.key(1), (1, 8, 8, 3)), jnp.array([3])


@pytest.fixture(scope="module")
def explained(call):
    return jaxq.explain(network, POLICY)(*call, scale=2.0)


def test_every_site_is_explained_in_the_form_that_it_has(explained):
    forms = {line.site: line.form for line in explained.lines}
    assert forms == {
        "stem": "patches",
        "table": "decoded rows",
        "up": "two rows",
        "mid": "two rows",
        "down": "decoded, then float",
        "head": "float",
    }


def test_costs_are_those_of_the_programs(explained, call):
    """Bytes count the operands as stored; times are there, and equal sites have one."""
    lines = {line.site: line for line in explained.lines}
    assert lines["up"].flops == 2 * 128 * 128 and lines["stem"].flops == 2 * 64 * 27 * 128
    assert lines["up"].cost == lines["mid"].cost
    assert lines["up"].float_cost.bytes >= 4 * (128 * 128 + 2 * 128)
    assert 128 * 128 < lines["up"].cost.bytes < lines["up"].float_cost.bytes / 2
    assert lines["head"].cost is None and lines["table"].cost is None
    everything = sum(x.nbytes for x in jax.tree.leaves(call[0]))
    assert explained.float_cost.bytes >= everything > explained.cost.bytes
    measured = [explained.float_cost, explained.cost, *(lines[n].cost for n in ("stem", "up", "down"))]
    assert explained.measured and all(cost.seconds > 0 for cost in measured)


def test_explanation_prints():
    lines = (
        Line("up", "dot_general", "dot", 2_000_000, Cost(4096, 4e-6), Cost(1024, 2e-6), ""),
        Line("head", "dot_general", "float", 500_000, None, None, "by policy"),
    )
    text = str(Explanation("v5e (tpu)", False, lines, Cost(8192, None), Cost(2048, 3e-6)))
    assert text.splitlines() == [
        "site             op           emitted  MFLOPs  float KiB  KiB  float us  us   speed  note",
        "----------------------------------------------------------------------------------------------",
        "up               dot_general  dot      2       4.0        1.0  4.0       2.0  2.00",
        "head             dot_general  float    0.5     -          -    -         -    -      by policy",
        "(whole program)                        2.5     8.0        2.0  -         3.0  -",
        "",
        "estimated by the compiler for v5e (tpu)",
    ]


def test_converted_parameters_are_refused(call):
    converted = jaxq.convert(network, POLICY)(*call)
    for verb in (jaxq.explain, jaxq.tune):
        with pytest.raises(TypeError, match="float parameters"):
            verb(network, POLICY)(converted, *call[1:])


def test_explain_needs_observed_ranges(call):
    with pytest.raises(ValueError, match="seen no data"):
        jaxq.explain(network, STATIC)(*call)


def test_scanned_sites_are_explained_by_their_layer():
    params = {"w": jnp.ones((3, 16, 16))}

    def stack(params, x):
        return lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, params["w"])[0]

    (line,) = jaxq.explain(stack, W8A8)(params, jnp.ones((4, 16))).lines
    assert line.form == "dot" and line.flops == 3 * 2 * 4 * 16 * 16 and line.cost.seconds > 0


def test_packed_weights_are_explained_as_they_are_multiplied():
    params, scheme = {"w": jnp.ones((64, 64))}, jaxq.Scheme(weight=jaxq.int4(), act=jaxq.int8())
    lines = [jaxq.explain(lambda p, x: x @ p["w"], scheme)(params, jnp.ones((rows, 64))).lines[0] for rows in (1, 32)]
    assert [line.form for line in lines] == ["halves of bytes", "dot"]
    assert lines[0].cost.bytes < lines[0].float_cost.bytes / 2


def test_tune_leaves_in_float_what_is_slower(call):
    asked = []

    def speed(item, decision):
        asked.append(item.site.name)
        return {"stem": 0.4, "up": 3.0, "down": 0.99}[item.site.name]

    plan = jaxq.calibrate(network, {**POLICY, "*": STATIC}, progress=False)(call[0], [call[1:]])
    tuned = jaxq.tune(network, plan, measure=speed)(*call)
    assert asked == ["stem", "up", "down"]  # `mid` is like `up`, lookups are not timed, `head` is float
    device = jax.devices()[0].device_kind
    assert tuned["stem"].scheme is None and tuned["stem"].reason == f"slower in int8 on {device}: 2.5x"
    assert {n: tuned[n] for n in plan.names if n != "stem"} == {n: plan[n] for n in plan.names if n != "stem"}
    assert f"slower in int8 on {device}: 2.5x" in str(tuned)
    assert jaxq.Plan.from_json(tuned.to_json()) == tuned
    by_hand = jaxq.calibrate(network, {"stem": None, **POLICY, "*": STATIC}, progress=False)(call[0], [call[1:]])
    serve = [jax.jit(jaxq.quantize(network, p))(jaxq.convert(network, p)(*call), *call[1:]) for p in (tuned, by_hand)]
    assert_bitwise(*serve)


def test_tune_measures_this_device():
    """Decoding k-means weights of a long vector at every call costs more than reading them in float."""
    params, x = {"w": jnp.ones((512, 512))}, jnp.ones((1, 512))
    plan = jaxq.tune(lambda p, x: x @ p["w"], jaxq.weight_only(jaxq.kmeans(16)))(params, x)
    assert plan["w"].scheme is None and plan["w"].reason.startswith("slower in")


def test_times_are_medians_of_each_call():
    ticks = iter(range(1000))
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    calls = [lambda: next(ticks), lambda: [next(ticks) for _ in range(9)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", clock)
        np.testing.assert_array_equal(timing.seconds(calls), [2.0, 10.0])


def test_groups_are_named_as_what_they_become():
    f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.ones((32, 8))}, jnp.ones((1, 32))
    scheme = jaxq.Scheme(weight=jaxq.int4(group=16), act=jaxq.int8())
    assert "a product for each group" in str(jaxq.explain(f, scheme)(params, x))
