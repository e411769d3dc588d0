"""Whether a site that was read from a file is one that a program could have.

A plan is believed when it is used: its shapes are multiplied, its dtypes looked up, its axes indexed. So what they say
is checked when it is read, where an error can still name the file.
"""

import math
import re
from collections.abc import Sequence

import jax.numpy as jnp

from jaxq.programs.ops import Conv, Dot, Embedding, RaggedDot
from jaxq.programs.sites import Operand, Site

OPERATIONS = {op.name: op for op in (Dot, Conv, RaggedDot, Embedding)}
ROLES = ("weight", "act")
NUMBERS = re.compile(r"bool|u?int\d{1,3}|b?float\d{1,3}(_[a-z0-9]{1,16})?|complex\d{1,3}", re.ASCII)
MOST = 2**63  # elements that an array can have, and products that can be summed


def check(site: Site) -> None:
    """Raise `ValueError` naming the site and the field that no program could have given it."""
    problem = _problem(site)
    if problem:
        raise ValueError(f"site '{site.name}' of the plan {problem}: make the plan again with jaxq.make_plan")


def _problem(site: Site) -> str | None:
    """Return what is wrong with a site: the first thing found."""
    op = OPERATIONS.get(site.op)
    if op is None:
        return f"has the op '{site.op:.40}', which is none of {', '.join(OPERATIONS)}"
    if len(site.operands) != op.operands or sum(o.role == "weight" for o in site.operands) > 1:
        return f"has other operands than a {site.op}"
    for number, operand in enumerate(site.operands):
        problem = _operand_problem(operand)
        if problem:
            return f"has an operand {number} {problem}"
    if not _is_shape(site.out_shape) or not _is_shape(site.stack) or not _is_dtype(site.out_dtype):
        return f"puts out {site.out_dtype:.40}{_short(site.out_shape)} in layers {_short(site.stack)}"
    terms = 0 if op is Embedding else _summed(site.operands[-1])
    if site.terms != terms:
        return f"sums {site.terms} terms where its operands have {terms}"
    if len(site.reuse) not in (0, op.operands) or not all(0 <= n < MOST for n in site.reuse):
        return f"reuses its operands {_short(site.reuse)} times"
    return None


def _operand_problem(operand: Operand) -> str | None:
    if operand.role not in ROLES:
        return f"of the role '{operand.role:.40}', which is none of {', '.join(ROLES)}"
    if not _is_shape(operand.shape):
        return f"of the shape {_short(operand.shape)}"
    if not _is_dtype(operand.dtype):
        return f"of the dtype '{operand.dtype:.40}'"
    axes = operand.contracted
    if len(set(axes)) != len(axes) or not all(0 <= axis < len(operand.shape) for axis in axes):
        return f"that is summed over the axes {_short(axes)} of {len(operand.shape)}"
    return None


def _summed(operand: Operand) -> int:
    """Return how many products an output sums: the last operand's contracted elements, kernels' windows included."""
    return math.prod(operand.shape[axis] for axis in operand.contracted)


def _is_shape(shape: Sequence[int]) -> bool:
    return all(n >= 0 for n in shape) and math.prod(max(1, n) for n in shape) < MOST


def _is_dtype(name: str) -> bool:
    """Tell whether a text is the name of a dtype of numbers; NumPy, which parses others, is not asked."""
    if not NUMBERS.fullmatch(name):
        return False
    try:
        return jnp.dtype(name).name == name
    except TypeError:
        return False


def _short(numbers: Sequence[int]) -> str:
    return f"{list(numbers)!r:.60}"
