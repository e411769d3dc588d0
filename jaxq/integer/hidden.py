"""Numbers that stand for larger ones, as those that hide a position from a softmax: where they may go.

Beside -1e9 scores would have no precision left, so it is brought near (`arithmetic.select`), and what is beyond `far`
stands for it from then on. Moves keep it; a softmax and a maximum know it; to anything else it would be a number.
"""

import math
from collections.abc import Sequence

import numpy as np
from jax import lax

from jaxq.integer import moves
from jaxq.integer.arithmetic import hides, is_beyond
from jaxq.integer.values import HIDDEN, Coded, Constant, Refusal, Value
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn

# What moves numbers, or asks for their order.
KEEPS = (
    moves.MOVES
    | {jaxpr.GATHER, jaxpr.SLICE, lax.cummax_p, lax.cummin_p, lax.reduce_max_p, lax.reduce_min_p, lax.argmax_p}
    | {lax.argmin_p, lax.convert_element_type_p}
)


def far_after(eqn: Eqn, operands: Sequence[Value]) -> float:
    """Return the size from which numbers of an equation's result stand for larger ones; refuse who takes their size."""
    data = [x for x in operands if isinstance(x, Coded)]
    far = min((x.far for x in data), default=math.inf)
    values = [x for x in data if x.pair is None]
    if not values and _stays_mask(eqn, operands):  # whose numbers are known, and told by the rule
        return math.inf
    masks = [x for x in operands if isinstance(x, Constant) or (isinstance(x, Coded) and x.pair)]
    if eqn.primitive in (lax.add_p, lax.sub_p) and len(values) == len(masks) == 1:  # which `add` selects by
        if values[0].far == math.inf or hides(masks[0], values[0]):
            return values[0].far
    elif far == math.inf or eqn.primitive in KEEPS or _is_selection(eqn, operands, far):
        return far
    raise Refusal(f"takes {HIDDEN}")


def _stays_mask(eqn: Eqn, operands: Sequence[Value]) -> bool:
    """Tell whether a mask is scaled or shifted by a number, or multiplied by another one."""
    if eqn.primitive is lax.mul_p and all(isinstance(x, Coded) for x in operands):
        return True
    numbers = [x for x in operands if not isinstance(x, Coded)]
    simple = all(isinstance(x, Constant) and x.reals.size == 1 for x in numbers)
    return (
        eqn.primitive in (lax.neg_p, lax.mul_p, lax.add_p, lax.sub_p) and simple and len(numbers) + 1 == len(operands)
    )


def _is_selection(eqn: Eqn, operands: Sequence[Value], far: float) -> bool:
    """Tell whether one of several values is selected that are less than `far`, or stand for larger numbers too."""
    if eqn.primitive is not lax.select_n_p:
        return False
    reach = max(x.real_reach for x in operands if isinstance(x, Coded))
    return all(_is_apart(case, far, reach) for case in operands[1:])


def check_near(values: Sequence[Value]) -> None:
    """Refuse values of which some numbers stand for larger ones."""
    if any(isinstance(v, Coded) and v.far < math.inf for v in values):
        raise Refusal(f"takes {HIDDEN}")


def _is_apart(case: Value, far: float, reach: float) -> bool:
    if isinstance(case, Coded):
        return case.far < math.inf or case.real_reach < far
    return isinstance(case, Constant) and (bool(np.all(np.abs(case.reals) < far)) or is_beyond(case, reach))
