"""Sharded is unsharded, on four devices that the host pretends to have."""

import os
import pathlib
import subprocess
import sys

import jaxq

HERE = pathlib.Path(__file__).parent


def test_sharded_is_unsharded():
    root = str(pathlib.Path(jaxq.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    script = [sys.executable, str(HERE / "sharded.py")]
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("passed") == 10
