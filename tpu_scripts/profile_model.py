"""Show where the time of a model goes: per site, and as a trace for a profiler.

    python tpu_scripts/profile_model.py --model mobilenet                    # a table: what sites became and cost
    python tpu_scripts/profile_model.py --model encoder --trace /tmp/trace   # and a trace of ten calls

The trace opens in TensorBoard's or xprof's profile plugin, and its `perfetto_trace.json.gz` at ui.perfetto.dev.
Runs on CPU, GPU and TPU.
"""

import argparse
from pathlib import Path

import jax

import jaxq
from bench_models import MODELS
from measurements import example
from variants import VARIANTS, call_of

CALLS = 10


def main() -> None:
    """Explain, and trace if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--variant", choices=list(VARIANTS), default="int8 dynamic")
    parser.add_argument("--trace", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    model, params, x, _ = example(options.model)
    plan = jaxq.make_plan(model.apply, VARIANTS[options.variant])(params, x)
    if plan.unobserved():
        plan = jaxq.calibrate(model.apply, plan, progress=False)(params, [x])
    print(jaxq.explain(model.apply, plan)(params, x))
    if options.trace:
        call = call_of(model, options.variant, params, x)
        jax.block_until_ready(call())
        with jax.profiler.trace(str(options.trace), create_perfetto_trace=True):
            for _ in range(CALLS):
                jax.block_until_ready(call())
        print(f"trace of {CALLS} calls in {options.trace}")


if __name__ == "__main__":
    main()
