"""Corners of the number formats: one leaf under two quantizers, sums that must not depend on the program, huge and tiny
numbers, options that do not go together, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq

pytestmark = pytest.mark.shared

HIGHEST = float(np.finfo(np.float32).max)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def sqnr(quantizer, x):
    """Return the ratio of signal to quantization noise in dB, in float64."""
    real, decoded = (np.asarray(a, np.float64) for a in (x, quantizer(x).decode()))
    scale = np.abs(real).max()
    return 10 * np.log10(((real / scale) ** 2).mean() / ((real / scale - decoded / scale) ** 2).mean())


def assert_trains_as_it_serves(f, policy, params, x):
    plan = jaxq.make_plan(f, policy)(params, x)
    converted = jaxq.convert(f, plan)(params, x)
    served, trained = jax.jit(jaxq.quantize(f, plan))(converted, x), jax.jit(jaxq.qat(f, plan))(params, x)
    np.testing.assert_array_equal(served, trained)


# --- one leaf, two quantizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (jaxq.int4(), jaxq.int4(fit=jaxq.mse())),
        (jaxq.int8(group=32), jaxq.mxint8()),
        (jaxq.mxfp4(16), jaxq.nvfp4(16)),
        (jaxq.int8(), jaxq.int8(narrow=False)),
    ],
    ids=repr,
)
def test_a_leaf_under_two_quantizers_is_stored_twice(first, second):
    def f(params, x):
        return jnp.stack([x @ params["w"], (2 * x) @ params["w"]])

    policy = {"w": jaxq.weight_only(first), "*": jaxq.weight_only(second)}
    params, x = {"w": normal(0, 64, 32)}, normal(1, 4, 64)
    assert_trains_as_it_serves(f, policy, params, x)
    stored = jaxq.convert(f, policy)(params, x)["w"]
    assert isinstance(stored, jaxq.Stored) and len(stored.codes) == 2


def test_codes_under_another_plan_are_refused():
    f, params, x = (lambda p, x: x @ p["w"]), {"w": normal(0, 64, 32)}, normal(1, 4, 64)
    converted = jaxq.convert(f, jaxq.weight_only(jaxq.mxint8()))(params, x)
    with pytest.raises(ValueError, match="'w'.*use the plan"):
        jaxq.quantize(f, jaxq.weight_only(jaxq.int8(group=32)))(converted, x)


# --- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [jaxq.int8(), None], ids=repr)
@pytest.mark.parametrize(
    "weight", [jaxq.binary(), jaxq.ternary(), jaxq.b158(), jaxq.int4(fit=jaxq.mean_abs())], ids=repr
)
def test_means_do_not_depend_on_the_program(weight, act):
    def f(params, x):
        return jnp.tanh(x @ params["v"]) @ params["w"].T

    params, x = {"v": normal(0, 40, 130), "w": normal(1, 257, 130)}, normal(2, 6, 40)
    assert_trains_as_it_serves(f, jaxq.Scheme(weight=weight, act=act), params, x)


@pytest.mark.parametrize("exponent", [-100, -60, 0, 60, 120])
def test_means_are_means(exponent):
    x = np.ldexp(np.random.default_rng(0).normal(size=(3000, 3)), exponent).astype(np.float32)
    got = np.asarray(jaxq.binary()(jnp.asarray(x)).scale, np.float64)[0]
    np.testing.assert_allclose(got, np.abs(x.astype(np.float64)).mean(0), rtol=1e-6)
    large = np.abs(x.astype(np.float64)) > 0.7 * got
    want = (np.abs(x.astype(np.float64)) * large).sum(0) / large.sum(0)
    np.testing.assert_allclose(np.asarray(jaxq.ternary()(jnp.asarray(x)).scale, np.float64)[0], want, rtol=1e-6)


# --- huge and tiny ---------------------------------------------------------------------------------------------------

TABLES = [jaxq.binary(), jaxq.ternary(), jaxq.b158(), jaxq.kmeans(16), jaxq.kmeans(16, group=64), jaxq.nf4()]


@pytest.mark.parametrize("quantizer", TABLES, ids=repr)
@pytest.mark.parametrize("exponent", [-110, -70, 70, 124])
def test_the_noise_of_a_format_does_not_depend_on_the_size_of_numbers(quantizer, exponent):
    x = normal(0, 128, 4)
    assert sqnr(quantizer, jnp.ldexp(x, exponent)) == pytest.approx(sqnr(quantizer, x), abs=0.01)


@pytest.mark.parametrize("quantizer", TABLES, ids=repr)
def test_the_largest_numbers_stay_finite(quantizer):
    assert np.isfinite(quantizer(jnp.full((128, 1), 3e38)).decode()).all()


def test_blocks_of_tiny_integers_keep_their_zeros():
    x = jnp.zeros((32, 2)).at[0].set(1e-37)
    decoded = np.asarray(jaxq.mxint8()(x).decode())
    assert not decoded[1:].any()
    np.testing.assert_allclose(decoded[0], 1e-37, atol=2.0**-120)


def test_grouped_products_of_huge_scales_are_finite():
    x, w = jnp.array([[1e30, 0, 0, 1]]), jnp.array([[0.0], [1e30], [0], [1]])
    scheme = jaxq.Scheme(weight=jaxq.int8(group=2), act=jaxq.int8())
    assert np.isfinite(jaxq.quantize(lambda w, x: x @ w, scheme)(w, x)).all()


@pytest.mark.parametrize(("dtype", "largest"), [(jnp.float16, 65504.0), (jnp.float32, HIGHEST)], ids=str)
def test_lookups_of_the_largest_numbers_are_finite(dtype, largest):
    table, rows = jnp.full((8, 4), largest, dtype), jnp.array([1, 2])
    scheme = jaxq.weight_only(jaxq.int8(power_of_two=True))
    out = jaxq.quantize(lambda t, i: jnp.take(t, i, axis=0), scheme)(table, rows)
    assert out.dtype == dtype and np.isfinite(np.asarray(out, np.float32)).all()


@pytest.mark.parametrize(
    "weight", [jaxq.mxint8(), jaxq.mxfp8(), jaxq.float16(), jaxq.fixed(8, 4), jaxq.int8()], ids=repr
)
def test_derived_weights_that_are_infinite_are_refused(weight):
    f, params = (lambda p, x: x @ (p["v"] * p["g"])), {"v": jnp.full((32, 4), 1e30), "g": jnp.full((1, 4), 1e30)}
    with pytest.raises(ValueError, match="infinity"):
        jaxq.convert(f, jaxq.weight_only(weight))(params, jnp.ones((2, 32)))


# --- rules -----------------------------------------------------------------------------------------------------------


def test_unsigned_codes_with_a_zero_point_keep_negative_numbers():
    x = normal(0, 4096, 2)
    assert sqnr(jaxq.uint8(fit=jaxq.octav()), x) > 35


def test_a_second_scale_costs_little():
    x = normal(0, 256, 8)
    for plain in (jaxq.nf4(16), jaxq.Quantizer(jaxq.float8().format, group=16)):
        nested = jaxq.Quantizer(plain.format, group=16, scaling=jaxq.nvfp4().scaling)
        assert sqnr(nested, x) > sqnr(plain, x) - 2.0


def uniform_batches(count, limit):
    return [jnp.asarray(np.random.default_rng(n).uniform(-limit, limit, (64, 16)), jnp.float32) for n in range(count)]


def test_overflow_rate_uses_all_codes_and_follows_the_data():
    f, params = (lambda p, x: x @ p["w"]), {"w": normal(0, 16, 4)}
    scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.dynamic_fixed(8, calibrator=jaxq.overflow_rate(1e-2)))

    def ends(batches):
        plan = jaxq.calibrate(f, scheme, progress=False)(params, batches)
        return float(plan.range("w")[0].hi)

    assert ends(uniform_batches(3, 0.999)) == 127 / 128  # codes up to 127 in steps of 2^-7
    zeros = [jnp.zeros((64, 16))]
    assert ends(zeros + uniform_batches(1, 0.999)) == ends(uniform_batches(2, 0.999) + zeros * 3) == 127 / 128
    grown = uniform_batches(3, 0.999) + uniform_batches(1, 7.99)
    assert ends(grown) == 2 * 127 / 128
    assert ends(grown + uniform_batches(4, 7.99)) == 8 * 127 / 128
    few = [batch.at[0, 0].set(7.0) for batch in uniform_batches(4, 0.999)]  # 1 of 1024, less than a hundredth
    assert ends(uniform_batches(1, 0.999) + few) == 127 / 128


def test_merged_plans_are_one_pass():
    f, params = (lambda p, x: x @ p["w"]), {"w": normal(0, 16, 4)}
    batches = [3**n * normal(n, 32, 16) for n in range(4)]
    for calibrator in (jaxq.minmax(), jaxq.percentile(99.0), jaxq.mse()):
        scheme = jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(per_tensor=True, calibrator=calibrator))
        plan = jaxq.make_plan(f, scheme)(params, batches[0])
        run = jaxq.calibrate(f, plan, progress=False)
        assert run(params, batches[:1]).merge(run(params, batches[1:])) == run(params, batches)
    other = jaxq.make_plan(f, jaxq.w8a8(static=True, calibrator=jaxq.ema()))(params, batches[0])
    with pytest.raises(ValueError, match="order of the batches"):
        other.merge(other)
    with pytest.raises(ValueError, match="different programs or policies"):
        plan.merge(other)


def test_stochastic_rounding_by_a_key_is_unbiased():
    x = jnp.full((20000,), 0.3)
    for quantizer in (jaxq.fixed(8, 2), jaxq.int4(per_tensor=True)):
        decoded = np.asarray(quantizer(x.at[0].set(1.0), key=jax.random.key(0)).decode(), np.float64)[1:]
        assert len(set(decoded)) == 2
        assert abs(decoded.mean() - 0.3) < 4 * decoded.std() / np.sqrt(decoded.size)
    with pytest.raises(TypeError, match="drop key="):
        jaxq.kmeans(4)(x, key=jax.random.key(0))


# --- where groups run, and what is refused ---------------------------------------------------------------------------


def test_a_vector_is_one_row():
    assert jaxq.int8()(jnp.ones(16)).scale.shape == (1,)
    assert jaxq.int4(group=4)(jnp.ones(16)).scale.shape == (4,)


def test_groups_of_a_kernel_run_along_its_input_channels():
    grids = {"HWIO": (3, 3, 2, 8), "OIHW": (8, 2, 3, 3)}
    for layout, shape in {"HWIO": (3, 3, 64, 8), "OIHW": (8, 64, 3, 3)}.items():
        images = ("NHWC", layout, "NHWC")

        def f(w, x, images=images):
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=images)

        converted = jaxq.convert(f, jaxq.weight_only(jaxq.int4(group=32)))(normal(0, *shape), normal(1, 2, 8, 8, 64))
        want = tuple(1 if (n == 3) else g for n, g in zip(shape, grids[layout], strict=True))
        assert converted.grid == want


@pytest.mark.parametrize(
    "make",
    [
        lambda: jaxq.Quantizer(jaxq.Int(8), group=16, scaling=jaxq.nvfp4().scaling),
        lambda: jaxq.Quantizer(jaxq.Codebook(4), group=16, scaling=jaxq.mxfp8().scaling),
        lambda: jaxq.Quantizer(jaxq.Int(8), group=32, symmetric=False, scaling=jaxq.mxint8().scaling),
        lambda: jaxq.Quantizer(jaxq.Int(8), group=32, power_of_two=True, scaling=jaxq.mxint8().scaling),
        lambda: jaxq.Quantizer(jaxq.Int(8), scaling=jaxq.mxint8().scaling),
        lambda: jaxq.Quantizer(jaxq.Fixed(8, 4), group=16),
        lambda: jaxq.int16(fit=jaxq.entropy()),
        lambda: jaxq.Ternary(float("nan")),
        lambda: jaxq.Ternary(-1.0),
        lambda: jaxq.int4(group=4)(jnp.ones((4, 4)), ()),
    ],
)
def test_what_does_not_go_together_is_refused(make):
    with pytest.raises(ValueError, match=r"drop|use|need|at least|add|go with"):
        make()


def test_plans_with_infinite_ranges_are_not_written():
    f, params = (lambda p, x: x @ p["w"]), {"w": jnp.ones((4, 4))}
    _, plan = jaxq.observe(f, jaxq.w8a8(static=True))(params, jnp.full((2, 4), jnp.inf))
    with pytest.raises(ValueError, match="'w'"):
        plan.to_json()
