"""The interpreter: one loop over equations, one rule per kind of sub-program.

Equations that contain no active site are issued again untouched, so custom derivatives, effects, shardings and
callbacks survive by construction; those that do are re-issued through JAX's public transforms with the interpreter
inside. Two one-way channels run beside the values, keyed by the site's path: `given` goes in, observations come out.
In a scan both have a leading axis where the site's weight differs by iteration, and are shared where it does not;
random keys differ by iteration in every loop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.interpretation.rules import Given, Rule
from jaxq.programs import jaxpr
from jaxq.programs.jaxpr import Body, Branches, CustomRule, Eqn, Inline, Loop, Manual, Remat, While
from jaxq.programs.sites import Located, Path

Channel = dict[Path, Given]
Seen = dict[Path, Any]


def _below(channel: dict[Path, Any], path: Path) -> dict[Path, Any]:
    depth = len(path)
    return {key: value for key, value in channel.items() if key[:depth] == path}


def _keys(channel: Channel) -> dict[Path, jax.Array]:
    return {path: given.key for path, given in channel.items() if given.key is not None}


def _with_keys(channel: Channel, keys: dict[Path, jax.Array | None]) -> Channel:
    return {path: given._replace(key=keys.get(path)) for path, given in channel.items()}


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """Runs a program with `rule` at its active sites. `sites`: active sites by path."""

    sites: dict[Path, Located]
    rule: Rule

    @functools.cached_property
    def holders(self) -> frozenset[Path]:
        """Paths of the equations whose sub-programs contain an active site."""
        return frozenset(path[:n] for path in self.sites for n in range(1, len(path), 2))

    @functools.cached_property
    def special(self) -> dict[Path, set[int]]:
        """For each sub-program, by path, the numbers of its equations that are active sites or contain one."""
        numbers: dict[Path, set[int]] = {}
        for path in (*self.sites, *self.holders):
            numbers.setdefault(path[:-1], set()).add(path[-1])
        return numbers

    def run(self, body: Body, args, channel: Channel, path: Path = ()) -> tuple[list, Seen]:
        """Return the outputs of a program and what was observed in it."""
        env: dict[Any, Any] = dict(zip(body.invars, [*body.consts, *args], strict=True))
        seen: Seen = {}
        special = self.special.get(path, ())
        for number, eqn in enumerate(body.jaxpr.eqns):
            operands = [v.val if isinstance(v, jaxpr.Literal) else env[v] for v in eqn.invars]
            if number in special:
                with jaxpr.Context(eqn):
                    outs = self.step(eqn, operands, channel, (*path, number), seen)
            else:
                outs = jaxpr.issue(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, jaxpr.Literal) else env[v] for v in body.jaxpr.outvars], seen

    def step(self, eqn: Eqn, operands: list, channel: Channel, path: Path, seen: Seen) -> list:
        """Run an equation that is an active site or contains one; add what is observed to `seen`."""
        if path in self.sites:
            outs, observation = self.rule(self.sites[path], eqn, operands, channel[path])
            if observation is not None:
                seen[path] = observation
            return outs
        sub = jaxpr.subprogram(eqn)
        outs, inner = self.HOLDERS[type(sub)](self, eqn, sub, operands, channel, path)
        seen.update(inner)
        return list(outs)

    # --- one rule per kind of sub-program ---

    def inline(self, eqn: Eqn, sub: Inline, operands, channel, path):
        del eqn
        if sub.sharding is None:
            return self.run(sub.body, operands, channel, (*path, 0))

        def call(*args):
            return self.run(sub.body, args, channel, (*path, 0))

        outs = (list(sub.sharding["out_shardings"]), None)
        return jax.jit(call, in_shardings=sub.sharding["in_shardings"], out_shardings=outs)(*operands)

    def remat(self, eqn: Eqn, sub: Remat, operands, channel, path):
        del eqn

        def call(args, given):
            return self.run(sub.body, args, given, (*path, 0))

        return jax.checkpoint(call, policy=sub.policy, prevent_cse=sub.prevent_cse)(operands, _below(channel, path))

    def loop(self, eqn: Eqn, sub: Loop, operands, channel, path):
        del eqn
        inner = _below(channel, path)
        keys = {key: jax.random.split(value, sub.length) for key, value in _keys(inner).items()}
        inner = _with_keys(inner, {})
        stacked = {key: value for key, value in inner.items() if path in self.sites[key].stacked}
        shared = {key: value for key, value in inner.items() if key not in stacked}
        first, last = sub.constants, sub.constants + sub.carries

        def step(carry, scanned):
            xs, given, own = scanned
            args = [*operands[:first], *carry, *xs]
            outs, seen = self.run(sub.body, args, _with_keys({**shared, **given}, own), (*path, 0))
            return outs[: sub.carries], (outs[sub.carries :], seen)

        carried = sub.body.jaxpr.invars[first:last]
        inits = [_strong(x, v) for x, v in zip(operands[first:last], carried, strict=True)]
        xs = (operands[last:], stacked, keys)
        carry, (ys, seen) = lax.scan(step, inits, xs, length=sub.length, reverse=sub.reverse, unroll=sub.unroll)
        merged = {k: v if path in self.sites[k].stacked else self.rule.merge_axis(v) for k, v in seen.items()}
        return [*carry, *ys], merged

    def while_loop(self, eqn: Eqn, sub: While, operands, channel, path):
        del eqn
        a, b = sub.condition_constants, sub.condition_constants + sub.body_constants
        tests, constants, inits = operands[:a], operands[a:b], list(operands[b:])

        def goes_on(carry):
            return self.run(sub.condition, [*tests, *carry], channel, (*path, 0))

        def body(carry, channel=channel):
            return self.run(sub.body, [*constants, *carry], channel, (*path, 1))

        if self.rule.once:
            return inits, {**goes_on(inits)[1], **body(inits)[1]}

        def watched(carry, channel=channel):
            """Run the body; its condition, which cannot report by itself, is asked once more for what it sees."""
            outs, seen = body(carry, channel)
            return outs, {**goes_on(carry)[1], **seen}

        blank = _zeros(jax.eval_shape(lambda c: watched(c)[1], inits))

        def step(state):
            carry, seen, keys = state
            given = _with_keys(channel, keys)
            outs, new = watched(carry, given) if blank else body(carry, given)
            later = {key: jax.random.fold_in(value, 1) for key, value in keys.items()}
            return outs, {key: self.rule.merge(seen[key], new[key]) for key in new}, later

        carry, seen, _ = lax.while_loop(
            lambda state: goes_on(state[0])[0][0], step, (inits, blank, _keys(_below(channel, path)))
        )
        last = goes_on(carry)[1] if blank else {}
        return carry, {**seen, **{key: self.rule.merge(seen[key], last[key]) for key in last}}

    def branches(self, eqn: Eqn, sub: Branches, operands, channel, path):
        del eqn
        index, args = operands[0], operands[1:]

        def branch(number: int):
            return lambda *xs: self.run(sub.bodies[number], xs, channel, (*path, number))

        calls = [branch(n) for n in range(len(sub.bodies))]
        if self.rule.once:
            results = [call(*args) for call in calls]
            return results[0][0], {key: value for _, seen in results for key, value in seen.items()}
        blank: Seen = {}
        for call in calls:
            blank.update(_zeros(jax.eval_shape(lambda *xs, call=call: call(*xs)[1], *args)))

        def padded(call):
            def run(*xs):
                outs, seen = call(*xs)
                return outs, {**blank, **seen}

            return run

        return lax.switch(index, [padded(call) for call in calls], *args)

    def custom_rule(self, eqn: Eqn, sub: CustomRule, operands, channel, path):
        """Quantize the forward pass; differentiate with the user's own rule, on the float program."""
        inner = _below(channel, path)

        def primal(args, given):
            return self.run(sub.body, args, given, (*path, 0))

        if self.rule.once:
            return primal(operands, inner)
        build = _with_user_jvp if sub.forward else _with_user_vjp
        return build(primal, lambda *args: jaxpr.rebind(eqn, *args))(operands, inner)

    def manual(self, eqn: Eqn, sub: Manual, operands, channel, path):
        del eqn

        def call(given, *args):
            outs, seen = self.run(sub.body, args, given, (*path, 0))
            return outs, {key: self.rule.merge_devices(value, sub.axis_names) for key, value in seen.items()}

        everywhere = jax.sharding.PartitionSpec()
        return jax.shard_map(
            call,
            mesh=sub.mesh,
            in_specs=(everywhere, *sub.in_specs),
            out_specs=(list(sub.out_specs), everywhere),
            axis_names=sub.axis_names,
            check_vma=sub.check_vma,
        )(_below(channel, path), *operands)

    HOLDERS: ClassVar[dict[type, Callable]] = {
        Inline: inline,
        Remat: remat,
        Loop: loop,
        While: while_loop,
        Branches: branches,
        CustomRule: custom_rule,
        Manual: manual,
    }


def _strong(x, var):
    """Return a carry with the type its loop was traced with (a Python scalar's type is weak)."""
    return lax.convert_element_type(x, var.aval.dtype) if jnp.result_type(x) != var.aval.dtype else x


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _no_tangent(tree):
    """Return zero cotangents of a tree: float0 for what is not differentiable."""

    def zero(x):
        inexact = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return jnp.zeros_like(x) if inexact else np.zeros(jnp.shape(x), jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def _with_user_jvp(primal, original):
    fn = jax.custom_jvp(primal)

    @fn.defjvp
    def rule(primals, tangents):
        outs, seen = fn(*primals)
        _, steps = jax.jvp(original, primals[0], tangents[0])
        return (outs, seen), (steps, _no_tangent(seen))

    return fn


def _with_user_vjp(primal, original):
    fn = jax.custom_vjp(primal)

    def forward(args, given):
        _, pull = jax.vjp(original, *args)
        return primal(args, given), (pull, given)

    def backward(saved, cotangents):
        pull, given = saved
        return list(pull(list(cotangents[0]))), _no_tangent(given)

    fn.defvjp(forward, backward)
    return fn
