"""The command line: what it says of good files, and one line, never a traceback, for bad ones."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import jaxq
from jaxq.cli.main import main

X = jnp.ones((2, 16))
PARAMS = {"up": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32), "b": jnp.ones((1, 8))}


def f(params, x):
    return x @ params["up"] + params["b"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return one file of each kind."""
    root = tmp_path_factory.mktemp("files")
    plan = jaxq.calibrate(f, jaxq.w8a8(static=True), progress=False)(PARAMS, [X])
    qparams = jaxq.convert(f, plan)(PARAMS, X)
    jaxq.save(root / "model", qparams, plan)
    jaxq.save(root / "sharded", qparams, plan, shard_bytes=100)
    jaxq.save(root / "other", {**qparams, "b": PARAMS["b"] + 0.5}, plan)
    four = jaxq.make_plan(f, jaxq.weight_only(jaxq.int4()))(PARAMS, X)
    jaxq.save(root / "int4", jaxq.convert(f, four)(PARAMS, X), four)
    (root / "plan.json").write_text(plan.to_json())
    jaxq.save_compressed_tensors(root / "compressed", qparams, plan)
    jaxq.export(f, plan, qparams, X, platforms=("cpu",)).save(root / "export")
    return root


def called(capsys, *words):
    """Return exit code and what was printed."""
    code = main([str(word) for word in words])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("model", "model", ["int8, scale [1, 8]", "16x8", "per tensor static", "1 of 1 sites quantized"]),
        ("sharded", "model", ["int8, scale [1, 8]", "agree with the plan"]),
        ("plan.json", "plan", ["dot_general"]),
        ("compressed", "compressed-tensors", ["up.weight", "int8, scale [8, 1]"]),
        ("compressed/model.safetensors", "safetensors", ["up.input_scale", "float32"]),
        ("export", "export", ["float32[batch,16]", "six months"]),
    ],
)
def test_inspect_shows_what_a_file_holds(files, capsys, name, kind, words):
    code, printed = called(capsys, "inspect", files / name)
    assert code == 0 and not printed.err
    assert all(word in printed.out for word in words), printed.out
    code, printed = called(capsys, "inspect", files / name, "--json")
    data = json.loads(printed.out)
    assert code == 0 and data["kind"] == kind and data["bytes"] > 100


def test_inspect_counts_bytes(files, capsys):
    data = json.loads(called(capsys, "inspect", files / "model", "--json")[1].out)
    leaves = {leaf["name"]: leaf for leaf in data["leaves"]}
    assert leaves["up"]["bytes"] == 16 * 8 + 8 * 4 and leaves["up"]["float_bytes"] == 16 * 8 * 4
    assert leaves["b"] == {"name": "b", "stored_as": "float32", "shape": [1, 8], "bytes": 32, "float_bytes": 32}
    assert data["bytes"] == (files / "model").stat().st_size
    assert jaxq.Plan.from_json(json.dumps(data["plan"])).names == ("up",)


@pytest.mark.parametrize(
    "b, words",
    [
        ("other", ["b", "other values, by 0.5 at most"]),
        ("int4", ["int8, scale [1, 8] [16, 8] in A, int4", "Scheme(weight=int8"]),
        ("plan.json", ["only in A"]),
    ],
)
def test_diff_finds_what_differs(files, capsys, b, words):
    code, printed = called(capsys, "diff", files / "model", files / b)
    assert code == 1 and all(word in printed.out for word in words), printed.out


def test_diff_of_the_same_is_nothing(files, capsys):
    code, printed = called(capsys, "diff", files / "model", files / "sharded")
    assert code == 0 and "hold the same" in printed.out
    code, printed = called(capsys, "diff", files / "model", files / "sharded", "--json")
    assert code == 0 and json.loads(printed.out) == {"leaves": [], "sites": [], "about": []}


@pytest.mark.parametrize("content", [b"", b"{}", b"{" * 9999, b"text", b"\xff" * 40, b"{\xff", None])
def test_bad_files_are_one_line(tmp_path, capsys, content):
    path = tmp_path / "bad"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    for command in (["inspect", path], ["diff", path, path]):
        code, printed = called(capsys, *command)
        assert code == 2 and not printed.out
        assert printed.err.startswith(f"{path}: ") and printed.err.count("\n") == 1
        code, printed = called(capsys, *command, "--json")
        assert code == 2 and not printed.err
        assert json.loads(printed.out)["error"].startswith(f"{path}: ")


def test_wrong_calls_end_with_the_usage(capsys):
    for words in ([], ["inspect"], ["paint", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "usage: python -m jaxq" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Exit codes" in (out := capsys.readouterr().out) and "inspect" in out and "diff" in out


def test_it_runs_as_a_program_and_bears_a_closed_pipe(files):
    root = str(pathlib.Path(jaxq.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    program = subprocess.Popen(
        [sys.executable, "-m", "jaxq", "inspect", files / "model"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    program.stdout.close()
    with program.stderr as stream:
        assert stream.read() == b""
    assert program.wait() == 0


def test_report_shows_what_a_model_costs(files, capsys, tmp_path):
    code, printed = called(capsys, "report", files / "model", "--html", tmp_path / "page.html")
    assert code == 0 and not printed.err and "up" in printed.out
    assert "<svg" in (tmp_path / "page.html").read_text()
    code, printed = called(capsys, "report", files / "sharded", "--json")
    assert code == 0 and json.loads(printed.out)["sites"][0]["name"] == "up"


def test_report_says_what_it_cannot_read_or_write(files, capsys, tmp_path):
    for words in (["report", files / "export"], ["report", files / "model", "--html", tmp_path / "no" / "page.html"]):
        code, printed = called(capsys, *words)
        assert code == 2 and printed.out == "" and printed.err.startswith(str(words[-1]))


def test_leaves_of_one_name_are_all_looked_at(capsys, tmp_path):
    """Two arguments that hold a leaf of the same name."""
    plan = jaxq.make_plan(lambda a, b, x: x @ a["w"] @ b["w"], jaxq.weight_only(), argnums=(0, 1))(
        {"w": jnp.eye(4)}, {"w": jnp.eye(4)}, jnp.ones((2, 4))
    )
    for name, size in (("a", 1.0), ("b", 2.0)):
        jaxq.save(tmp_path / name, ({"w": size * jnp.eye(4)}, {"w": jnp.eye(4)}), plan)
    code, printed = called(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1 and "other values" in printed.out
    assert "2 leaves" in called(capsys, "inspect", tmp_path / "a")[1].out


def test_zero_points_on_one_side_differ(capsys, tmp_path):
    for symmetric in (True, False):
        policy = jaxq.weight_only(jaxq.int8(symmetric=symmetric))
        plan = jaxq.make_plan(f, policy)(PARAMS, X)
        jaxq.save(tmp_path / str(symmetric), jaxq.convert(f, plan)(PARAMS, X), plan)
    code, printed = called(capsys, "diff", tmp_path / "True", tmp_path / "False")
    assert code == 1 and "zero points" in printed.out


def test_report_takes_the_names_of_modules_and_several_arguments(capsys, tmp_path):
    module = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    plan = jaxq.make_plan(lambda m, x: m(x), jaxq.w8a8())(module, jnp.ones((2, 8)))
    jaxq.save(tmp_path / "module", jaxq.convert(lambda m, x: m(x), plan)(module, jnp.ones((2, 8))), plan)
    two = jaxq.make_plan(lambda a, b, x: x @ a["w"] @ b["v"], jaxq.w8a8(), argnums=(0, 1))
    pair = ({"w": jnp.eye(4)}, {"v": jnp.eye(4)})
    jaxq.save(tmp_path / "pair", pair, two(*pair, jnp.ones((2, 4))))
    for name in ("module", "pair"):
        code, printed = called(capsys, "report", tmp_path / name)
        assert code == 0 and "MACs" in printed.out, printed.err


def test_control_characters_of_a_file_stay_in_the_file(capsys, tmp_path):
    safetensors.numpy.save_file({"\x1b[31mred": np.ones(2, np.float32)}, tmp_path / "file")
    code, printed = called(capsys, "inspect", tmp_path / "file")
    assert code == 0 and "\\x1b[31mred" in printed.out and "\x1b" not in printed.out
