"""Count the matrix products and convolutions in the text of a JAX program, integer and float apart.

Reads both what JAX hands to the compiler, `jax.jit(f).lower(x).as_text()` (StableHLO), and what the compiler made of
it, `.compile().as_text()` (HLO). A product is found wherever it stands: in the main program, in a called function, in a
fusion, or as a custom call to a library. A function called twice counts twice: two layers of one shape count as two.

Sharp edges: the body of a loop counts once, however often it runs; every branch of a conditional counts. A compiler may
turn a tiny product into multiplications and additions, a narrow one into a wide one, on TPU a dot into a convolution.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

EIGHT_BITS = re.compile(r"(?:s8|u8|i8|ui8)$")
INTEGER = re.compile(r"(?:s|u|i|ui)\d+$")

MLIR_FUNCTION = re.compile(r'^\s*func\.func .*?@("[^"]+"|[\w.$-]+)')
MLIR_PRODUCT = re.compile(r'"?stablehlo\.(dot_general|dot|convolution)"?[ (].* : \((.*)\) -> (.*)$')
MLIR_NAME = re.compile(r'@("[^"]+"|[\w.$-]+)')
MLIR_DTYPE = re.compile(r"tensor<(?:[\d?]+x)*([a-z]+\d\w*)")

HLO_FUNCTION = re.compile(r"^(ENTRY )?%?([\w.$-]+)(?: \(.*)? \{$")
HLO_VALUE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.+?) (?:[a-z][a-z0-9-]*)\(")
HLO_PRODUCT = re.compile(r"^\s+(?:ROOT )?%?[\w.$-]+ = .+? (dot|convolution|custom-call)\(([^)]*)\)")
HLO_TARGET = re.compile(r'custom_call_target="([^"]*)"')
HLO_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.$-]+))")
HLO_DTYPE = re.compile(r"\b([a-z]+\d\w*)\[")


class Function(NamedTuple):
    """One function of the program: its own products, and how often it mentions each other function."""

    products: Counter
    calls: Counter


def count_ops(text: str) -> dict[str, int]:
    """Return `{"int8_dots": n, "int8_convs": n, "float_dots": n, "float_convs": n}` for StableHLO or HLO text.

    A product is `int8` when its result is an integer or when both its operands have 8 bits, as where a backend hands
    the sum of integer products out as float32. Raises `ValueError` for text that holds no program.
    """
    functions, entry = _parse_hlo(text) if text.lstrip().startswith("HloModule") else _parse_mlir(text)
    if entry not in functions:
        raise ValueError("no program found: expected StableHLO from lower().as_text() or HLO from compile().as_text()")
    total = _total(entry, functions, {})
    return {f"{kind}_{op}": total[kind, op] for kind in ("int8", "float") for op in ("dots", "convs")}


def _total(name: str, functions: dict[str, Function], known: dict[str, Counter]) -> Counter:
    """total(f) = products(f) + sum over calls of total(callee); call graphs have no cycles."""
    if name not in known:
        total = Counter(functions[name].products)
        for callee, times in functions[name].calls.items():
            for product, count in _total(callee, functions, known).items():
                total[product] += times * count
        known[name] = total
    return known[name]


def _kind(operands: list[str], results: list[str]) -> str:
    narrow = len(operands) >= 2 and all(EIGHT_BITS.match(dtype) for dtype in operands[:2])
    return "int8" if narrow or (results and INTEGER.match(results[0])) else "float"


def _parse_mlir(text: str) -> tuple[dict[str, Function], str]:
    functions: dict[str, Function] = {}
    current = Function(Counter(), Counter())
    for line in text.splitlines():
        if head := MLIR_FUNCTION.match(line):
            current = functions[head[1]] = Function(Counter(), Counter())
            continue
        if product := MLIR_PRODUCT.search(line):
            kind = _kind(MLIR_DTYPE.findall(product[2]), MLIR_DTYPE.findall(product[3]))
            current.products[kind, "convs" if product[1] == "convolution" else "dots"] += 1
        current.calls.update(MLIR_NAME.findall(line))
    return _only_known(functions), "main"


def _parse_hlo(text: str) -> tuple[dict[str, Function], str]:
    functions: dict[str, Function] = {}
    current, entry = Function(Counter(), Counter()), ""
    dtypes = {value[1]: HLO_DTYPE.findall(value[2]) for value in map(HLO_VALUE.match, text.splitlines()) if value}
    for line in text.splitlines():
        if head := HLO_FUNCTION.match(line):
            current = functions[head[2]] = Function(Counter(), Counter())
            entry = head[2] if head[1] else entry
            continue
        if (product := HLO_PRODUCT.match(line)) and (op := _hlo_op(product[1], line)):
            current.products[_kind(_hlo_operands(product[2], dtypes), HLO_DTYPE.findall(line)), op] += 1
        current.calls.update(_hlo_calls(line))
    return _only_known(functions), entry


def _hlo_op(opcode: str, line: str) -> str | None:
    """`dot`, `convolution`, or a library's name for one: `__onednn$matmul`, `__cublas$gemm`, `__cudnn$convForward`."""
    target = HLO_TARGET.search(line)
    name = target[1].lower() if opcode == "custom-call" and target else opcode
    if "conv" in name:
        return "convs"
    return "dots" if any(word in name for word in ("dot", "matmul", "gemm")) else None


def _hlo_operands(text: str, dtypes: dict[str, list[str]]) -> list[str]:
    """Operand types as written, `dot(s8[4,8]{1,0} %a, ...)`, else from the lines that define them, `dot(%a, ...)`."""
    written = HLO_DTYPE.findall(text)
    return written or [dtype for name in re.findall(r"[\w.$-]+", text) for dtype in dtypes.get(name, [])[:1]]


def _hlo_calls(line: str) -> Iterator[str]:
    for several, single in HLO_CALLS.findall(line):
        yield from re.findall(r"[\w.$-]+", several or single)


def _only_known(functions: dict[str, Function]) -> dict[str, Function]:
    """Drop mentions of what is not a function, such as a custom call's target."""
    for function in functions.values():
        for name in set(function.calls) - set(functions):
            del function.calls[name]
    return functions
