"""Measure jaxq against float32: inference, training step, tracing and import time.

    python tpu_scripts/bench.py                                  # everything
    python tpu_scripts/bench.py --only mlp --what training --quick
    python tpu_scripts/bench.py --peers --json bench.json --markdown bench.md

Runs unchanged on CPU, GPU and TPU: on whatever device JAX finds first. All programs of one comparison run interleaved
in one process (see `timing.py`), and each table starts with the ratio. float32 means JAX's default precision, which
multiplies in TF32 on recent GPUs and in bfloat16 on TPUs.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import jax

from bench_models import MODELS
from bench_tables import Settings, heading, markdown, surroundings
from measurements import MEASUREMENTS


def choice(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def default() -> list[str]:
    """Return what is measured unless something is asked for: on a CPU, not what takes an accelerator."""
    return [name for name in MEASUREMENTS if name != "large" or jax.default_backend() != "cpu"]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=choice(list(MODELS)), default=list(MODELS), metavar="MODELS", help="mlp,encoder")
    parser.add_argument("--what", type=choice(list(MEASUREMENTS)), default=default(), help=",".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--peers", action="store_true", help="measure qwix and ONNX Runtime too, if installed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    settings = Settings(options.only, rounds=3 if options.quick else 10, block=10, peers=options.peers)
    facts = surroundings()
    pages, tables = [heading(facts)], []
    print(pages[0])
    for name in options.what:
        tables.append(MEASUREMENTS[name](settings))
        pages.append(markdown(tables[-1]))
        print(pages[-1], flush=True)
    if options.json:
        report = {"surroundings": facts, "tables": [asdict(table) for table in tables]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(pages))


if __name__ == "__main__":
    main()
