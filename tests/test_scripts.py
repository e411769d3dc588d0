"""The scripts for accelerators: their models have the sites they should, and float products do not pass unnoticed."""

import sys
import types
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tpu_scripts"))

import compile_for
from bench_models import MODELS
from variants import VARIANTS, plan_of

# Products with weights, and of activations: 2 to a layer of attention.
SITES = {"mlp": 4, "resnet18": 21, "encoder": 6 * 8, "mobilenet": 53, "decoder": 2 * 8, "lstm": 2}
COUNTED = {"int8_dots": 2, "int8_convs": 0, "float_dots": 0, "float_convs": 0}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_quantized_whole(name):
    """From shapes alone, in every variant; static ranges count as observed."""
    for variant in VARIANTS if name == "mlp" else ["int8 static"]:
        plan = plan_of(MODELS[name], variant, *compile_for.shapes_of(MODELS[name]))
        assert len(plan.sites) == SITES[name] and all(d.is_integer for d in plan.decisions)
        assert not plan.unobserved()


def test_mobilenet_is_half_of_the_published_one():
    """97 M multiply-adds at half the width and 224x224 (Sandler et al. 2018, table 4), with a larger head."""
    plan = plan_of(MODELS["mobilenet"], "int8 dynamic", *compile_for.shapes_of(MODELS["mobilenet"]))
    per_image = sum(site.flops for site in plan.sites) / 2 / 8
    assert per_image / 1e6 == pytest.approx(97 * (96 / 224) ** 2, rel=0.1)


def test_products_in_float_are_counted_against_the_plan():
    shapes = compile_for.shapes_of(MODELS["lstm"])
    plan = plan_of(MODELS["lstm"], "int8 static", *shapes)
    assert compile_for.strays(COUNTED, plan) == 0
    assert compile_for.strays({**COUNTED, "float_convs": 1}, plan) == 1
    assert compile_for.strays({**COUNTED, "float_dots": 2, "float_convs": 1}, plan) == 3


def test_estimates():
    """A TPU's compiler takes a second off for every part that it does not know; a GPU is bound by products or bytes."""
    program = types.SimpleNamespace(
        cost_analysis=lambda: {"optimal_seconds": 25e-6 - 2},
        memory_analysis=lambda: types.SimpleNamespace(argument_size_in_bytes=3e9, output_size_in_bytes=0.35e9),
    )
    seconds, unknown = compile_for.estimate(program, compile_for.TARGETS["v5e"], 0.0, 0)
    assert (round(seconds * 1e6, 3), unknown) == (25.0, 2)
    h100 = compile_for.TARGETS["h100"]
    assert compile_for.estimate(program, h100, h100.int8, 10**9).seconds == pytest.approx(1e-3)
    assert compile_for.estimate(program, h100, h100.int8, int(1979e12)).seconds == pytest.approx(1.0)


def test_quantized_programs_take_converted_weights():
    f, (params, x), plan = compile_for.quantized(MODELS["mlp"], "int4 weights", compile_for.shapes_of(MODELS["mlp"]))
    assert params["dense0"]["kernel"].stored.shape == (1024, 512)
    assert jax.eval_shape(f, params, x).shape == (128, 10) and len(plan.sites) == 4
