"""What becomes of a site's output: still its values, some of them, or something else.

An operand that is another site's output, merely moved, is on that site's grid already: one quantizer serves both. So
does what picks values (a slice, a maximum) and what puts zeros among them (padding, ReLU), as far as zero is exact.
"""

from collections.abc import Callable, Sequence

from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Eqn
from jaxq.programs.sites import Made

Rule = Callable[[Eqn, Sequence[Made | None]], Made | None]

# Zeros that no site put out: as good as an output, wherever zero is exact.
ZERO = Made(())


def moved(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """Return whose output the result of an ordinary equation is; made: the same of its operands."""
    rule = RULES.get(eqn.primitive) if any(made) else None
    return rule(eqn, made) if rule and jaxpr.is_float(eqn.outvars[0].aval) else None


def _same(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """Every value, as it was, somewhere."""
    del eqn
    return made[0] if len(made) == 1 else None


def _picked(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """Every result is one of the values of the first operand."""
    del eqn
    return made[0] and made[0]._replace(whole=False)


def _padded(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """The values between zeros; negative padding takes values away."""
    cut = any(low < 0 or high < 0 for low, high, _ in eqn.params["padding_config"])
    both = _one_of(eqn, made)
    return both and both._replace(whole=made[0].whole and not cut)


def _one_of(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """Every result is a value of one of the operands, which are all of one site, or zeros: max(x, 0), say."""
    del eqn
    paths = {m.path for m in made if m and m.path}
    if not all(made) or len(paths) != 1:
        return None
    return Made(paths.pop(), whole=False, padded=any(m.padded or not m.path for m in made))


def _selected(eqn: Eqn, made: Sequence[Made | None]) -> Made | None:
    """The same of all operands but the first, which selects."""
    return _one_of(eqn, made[1:])


RULES: dict[object, Rule] = {
    **dict.fromkeys(jaxpr.MOVES, _same),
    **dict.fromkeys(jaxpr.PICKS, _picked),
    **dict.fromkeys(jaxpr.JOINS, _one_of),
    jaxpr.SELECT: _selected,
    jaxpr.PAD: _padded,
}
