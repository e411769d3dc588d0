"""Reports: numbers against float64 NumPy and hand calculation, texts against what they must hold."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.numbers import histogram, noise
from jaxq.numbers.levels import levels
from jaxq.report.report import decibels
from zoo import NAMES, model

ROWS, WIDE, HIDDEN, OUT = 32, 48, 64, 10


def network(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["head"]


def _params():
    rng = np.random.default_rng(0)
    up, head = rng.normal(size=(WIDE, HIDDEN)), rng.normal(size=(HIDDEN, OUT))
    return {"up": jnp.asarray(up, jnp.float32), "head": jnp.asarray(head, jnp.float32)}


def _batches(count=3):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=(ROWS, WIDE)) * (n + 1), jnp.float32) for n in range(count)]


@pytest.fixture(scope="module")
def int8_report():
    with jax.numpy_rank_promotion("raise"):
        return jaxq.report(network, jaxq.w8a8(), progress=False)(_params(), _batches())


def _rounded(x, axis):
    """int8 symmetric in float64, one scale per index that is not summed over."""
    scale = np.abs(x).max(axis, keepdims=True) / 127
    return np.rint(x / scale) * scale


def _sqnr(pairs):
    signal = sum(np.sum(x**2) for x, _ in pairs)
    return 10 * math.log10(signal / sum(np.sum((y - x) ** 2) for x, y in pairs))


def _exact():
    params = {name: np.asarray(w, np.float64) for name, w in _params().items()}
    return params, [np.asarray(x, np.float64) for x in _batches()]


def test_sqnr_is_that_of_float64(int8_report):
    params, batches = _exact()
    up, head = params["up"], params["head"]
    hidden = [np.maximum(x @ up, 0) for x in batches]
    rough = [np.maximum(_rounded(x, 1) @ _rounded(up, 0), 0) for x in batches]
    expected = {
        ("up", "weight"): _sqnr([(up, _rounded(up, 0))]),
        ("head", "weight"): _sqnr([(head, _rounded(head, 0))]),
        ("up", "act"): _sqnr([(x, _rounded(x, 1)) for x in batches]),
        ("head", "act"): _sqnr([(h, _rounded(h, 1)) for h in hidden]),
        ("up", "alone"): _sqnr([(x @ up, _rounded(x, 1) @ _rounded(up, 0)) for x in batches]),
        ("head", "alone"): _sqnr([(h @ head, _rounded(h, 1) @ _rounded(head, 0)) for h in hidden]),
        ("head", "together"): _sqnr(
            [(h @ head, _rounded(r, 1) @ _rounded(head, 0)) for h, r in zip(hidden, rough, strict=True)]
        ),
    }
    for (name, what), db in expected.items():
        site = int8_report[name]
        seen = site.noise(what) if what in ("weight", "act") else getattr(site, what)
        assert decibels(seen) == pytest.approx(db, abs=0.02), (name, what)
    assert decibels(int8_report.output) == pytest.approx(expected["head", "together"], abs=0.02)


def test_noise_of_a_product_is_the_sum_of_its_operands_noise(int8_report):
    for site in int8_report.sites:
        operands = [10 ** (-decibels(site.noise(role)) / 10) for role in ("weight", "act")]
        assert decibels(site.alone) == pytest.approx(-10 * math.log10(sum(operands)), abs=0.5)


def test_cost_is_that_of_a_hand_calculation(int8_report):
    macs = ROWS * (WIDE * HIDDEN + HIDDEN * OUT)
    weights = 4 * (WIDE * HIDDEN + HIDDEN * OUT), WIDE * HIDDEN + HIDDEN * OUT + 4 * (HIDDEN + OUT)
    assert int8_report.macs == macs
    assert int8_report.bops == (macs * 1024, macs * 64)
    assert int8_report.bytes == weights
    assert tuple(sum(s.cost.bytes[n] for s in int8_report.sites) for n in (0, 1)) == weights
    inputs, outputs = ROWS * (WIDE + HIDDEN), ROWS * (HIDDEN + OUT)
    plain, coded = int8_report.energy
    assert plain == pytest.approx((4.6 * macs, 640 / 4 * weights[0], 50 / 32 * (32 * inputs + 32 * outputs)))
    assert coded == pytest.approx((0.3 * macs, 640 / 4 * weights[1], 50 / 32 * (8 * inputs + 32 * outputs)))
    times = [int8_report.seconds, *(site.seconds for site in int8_report.sites)]
    assert all(0 < seconds < 1 for both in times for seconds in both)


def test_the_printed_table_fits(int8_report, monkeypatch):
    for width in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = str(int8_report).splitlines()
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines[2:4]] == ["up", "head"]
    assert "15.33x less" in str(int8_report)


def test_json_holds_what_the_report_holds(int8_report):
    data = json.loads(int8_report.to_json(), parse_constant=pytest.fail)
    assert data["sites"][0]["seconds"]["float"] == int8_report["up"].seconds.float
    assert data["sites"][0]["alone"]["db"] == decibels(int8_report["up"].alone)
    weight = data["sites"][1]["measured"][1]
    assert sum(weight["histogram"]["counts"]) == HIDDEN * OUT
    largest = float(np.abs(np.asarray(_params()["head"])).max())
    assert len(weight["levels"]) == 255 and weight["levels"][-1] == pytest.approx(largest, rel=1e-6)
    assert data["energy_pj"]["quantized"]["compute"] == pytest.approx(0.3 * int8_report.macs)


def test_pictures_are_written(int8_report, tmp_path):
    paths = int8_report.to_png(tmp_path / "pictures")
    assert [p.name for p in paths] == ["error.png", "bytes.png", "values.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_the_loop_of_the_debugger():
    policy = {"up": jaxq.weight_only(jaxq.int2()), "head": jaxq.w8a8(static=True)}
    plan = jaxq.calibrate(network, policy, progress=False)(_params(), _batches(1))
    first = jaxq.report(network, plan, progress=False, timed=False)(_params(), _batches(1))
    assert first.worst(1) == ["up"]
    plan = jaxq.revise(plan, dict.fromkeys(first.worst(1)))
    assert plan["up"].reason == "by policy" and plan.range("head")[0] is not None and not plan.unobserved()
    assert first.seconds is None and first["up"].seconds is None
    second = jaxq.report(network, plan, progress=False, timed=False)(_params(), _batches(1))
    assert decibels(second.output) > decibels(first.output) + 20
    assert second["up"].alone is None and "up stays float: by policy" in str(second)
    assert math.isinf(decibels(second["up"].together))


def test_a_revised_plan_keeps_the_links_between_outputs_and_operands():
    both = jaxq.w8a8(static=True).scheme
    linked = jaxq.Scheme(weight=both.weight, act=both.act, out=both.act)
    params, x = _params(), _batches(1)[0]
    plan = jaxq.calibrate(_chain, {"up": linked, "head": both}, progress=False)(params, [x])
    assert plan["head"].fed and plan.range("head")[0] is None
    same = jaxq.revise(plan, {"up": linked})
    assert same == plan
    freed = jaxq.revise(plan, {"up": both})
    assert not freed["head"].fed and freed.unobserved() == ["head"]
    assert float(freed.range("up")[0].hi) == float(plan.range("up")[0].hi)
    with pytest.raises(ValueError, match="'head': a plan does not know who reads"):
        jaxq.revise(plan, {"head": linked})


def _chain(params, x):
    return (x @ params["up"]) @ params["head"]


HOLDING = ["scan_xs", "while_loop", "cond", "custom_vjp", "shard_map"]


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", [*HOLDING, *(pytest.param(n, marks=pytest.mark.long) for n in NAMES if n not in HOLDING)]
)
def test_programs_with_programs_inside(name):
    entry = model(name)
    report = jaxq.report(entry.fn, jaxq.w8a8(), progress=False, timed=False)(entry.params, [entry.args])
    exact = jax.tree.leaves(jax.jit(entry.fn)(entry.params, *entry.args))
    rough = jax.tree.leaves(jax.jit(jaxq.quantize(entry.fn, jaxq.w8a8()))(entry.params, *entry.args))
    floats = [(a, b) for a, b in zip(exact, rough, strict=True) if jnp.issubdtype(a.dtype, jnp.floating)]
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in floats]
    assert decibels(report.output) == pytest.approx(_sqnr(pairs), abs=0.1)
    ran = [site for site in report.sites if site.cost.macs]
    assert ran and all(30 < decibels(site.alone) < 60 for site in ran if site.alone is not None)
    json.loads(report.to_json(), parse_constant=pytest.fail)
    if name == "scan_xs":
        assert noise.decibels(report["layers/up"].alone).shape == (3,)
    if name == "gru":  # five time steps by one weight
        assert report["cell/hr"].cost.macs == 5 * report["cell/hr"].decision.site.flops // 2


def test_converted_parameters_tell_what_they_can(int8_report):
    params, x = _params(), _batches(1)[0]
    policy = {"up": jaxq.w8a8(), "head": jaxq.weight_only(jaxq.nf4(group=64))}
    plan = jaxq.make_plan(network, policy)(params, x)
    qparams = jaxq.convert(network, plan)(params, x)
    compared, alone = jaxq.saved_report(qparams, plan, reference=params), jaxq.saved_report(qparams, plan)
    measured = decibels(int8_report["up"].noise("weight"))
    assert decibels(compared["up"].noise("weight")) == pytest.approx(measured, abs=1e-3)
    assert decibels(alone["up"].noise("weight")) == pytest.approx(measured, abs=0.3)
    assert 15 < decibels(compared["head"].noise("weight")) < 25 and math.isnan(decibels(alone["head"].noise("weight")))
    assert alone["head"].cost.bytes.quantized == HIDDEN * OUT // 2 + 4 * OUT
    assert alone.bytes.float == int8_report.bytes.float and alone.macs == int8_report.macs
    assert "estimated" in str(alone) and alone.seconds is None
    json.loads(alone.to_json(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="'up' is made of up, which"):
        jaxq.saved_report({"head": qparams["head"]}, plan)


def test_nothing_to_run_on_and_nan_are_errors():
    with pytest.raises(ValueError, match="at least one batch"):
        jaxq.report(network, progress=False)(_params(), [])
    bad = _batches(1)[0].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="batch 0 brings NaN or infinity to site 'up'"):
        jaxq.report(network, progress=False)(_params(), [bad])
    with pytest.raises(ValueError, match="seen no data: up, head"):
        jaxq.report(network, jaxq.w8a8(static=True), progress=False)(_params(), _batches(1))
    converted = jaxq.convert(network)(_params(), _batches(1)[0])
    with pytest.raises(TypeError, match="pass the float parameters"):
        jaxq.report(network, progress=False)(converted, _batches(1))


def test_noise_neither_overflows_nor_vanishes():
    x = np.random.default_rng(2).normal(size=1000)
    for unit in (1e-30, 1.0, 1e30):
        exact, near = (np.float32(unit * v) for v in (x, x + 0.01))
        parts = [noise.of(exact[a], near[a]) for a in (slice(0, 300), slice(300, 1000))]
        whole = noise.merge_axis(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
        assert decibels(whole) == pytest.approx(_sqnr([(x, x + 0.01)]), abs=0.01)


@pytest.mark.parametrize("make", [jaxq.int4, jaxq.uint8, jaxq.kmeans, jaxq.nf4, jaxq.float8, jaxq.mxfp4, jaxq.b158])
def test_the_grid_holds_every_decoded_number_of_its_block(make):
    options = {"group": 32} if make in (jaxq.nf4, jaxq.mxfp4) else {"per_tensor": True}
    quantizer = make(16) if make is jaxq.kmeans else make(**options)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(32, 1)), jnp.float32)
    q = quantizer(x)
    assert set(np.asarray(q.decode()).ravel()) <= set(np.asarray(levels(quantizer, q)))


def test_bins_keep_counts_and_edges():
    from jaxq.report.bins import binned

    x = np.random.default_rng(4).normal(size=5000).astype(np.float32)
    bins = binned(jax.tree.map(np.asarray, histogram.of(x)), 50)
    width = bins.edges[1] - bins.edges[0]
    assert bins.counts.sum() == 5000 and len(bins.counts) <= 50
    assert abs(bins.low - x.min()) <= width and abs(bins.high - x.max()) <= width


@pytest.mark.parametrize("quantizer", [jaxq.bfloat16(), jaxq.int16()], ids=repr)
def test_formats_of_many_levels_are_drawn_without_a_grid(quantizer):
    f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    report = jaxq.report(f, jaxq.weight_only(quantizer), progress=False, timed=False)(params, [x])
    assert json.loads(report.to_json())["sites"][0]["name"] == "w"
