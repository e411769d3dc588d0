"""The README's code runs, in order, in one namespace."""

import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_code_runs_and_prints_what_it_shows(capsys):
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 5
    namespace = {}
    with jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    assert namespace["outputs"].shape == (32, 10)
    printed = capsys.readouterr().out.strip()
    assert printed and printed in text


@pytest.mark.parametrize("heading", ["## Run", "## Test"])
def test_readme_has_the_two_commands(heading):
    assert re.search(rf"^{heading}$.*?```bash\n.*?-m venv", README.read_text(), re.S | re.M)
