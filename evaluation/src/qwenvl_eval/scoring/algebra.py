"""What runs inside the sandbox: LaTeX is parsed there and turned into numbers. See :mod:`.sandbox`.

The sandbox runs this file as a program, ``python -I algebra.py``. It uses the standard library, sympy and
latex2sympy2_extended, and nothing else of this package. Nothing here evaluates text as Python: the parser
builds a sympy tree without evaluating it, and the tree is walked with fractions and floats. Where a fraction
would get longer than ``_BITS`` bits the walk goes on with floats, so that no expression is more work than it
is long.
"""

from __future__ import annotations

import cmath
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

Number = Fraction | float | complex

_BITS = 4096
_FACTORIAL = 1000
# The value of the first symbol and the factor from each to the next.
_PROBES = (
    (1.3, 0.7),
    (0.41, 2.9),
    (2.17, 1.61),
    (3.7, 0.23),
)


class NoValue(ValueError):
    """The expression is no number, or none that is worked out here."""


def value(text: str) -> int | float | None:
    """The real number that a LaTeX expression stands for; None for everything else.

    Knows the functions that Python's ``math`` knows by sympy's names, as the MathVision script does.
    """
    try:
        number = _number(_parse(text), {}, _OFFICIAL)
        if isinstance(number, complex) or not math.isfinite(number):
            return None
        return int(number) if number == int(number) else float(number)
    except _ERRORS:
        return None


def equal(one: str, others: list[str], tolerance: float) -> list[bool]:
    """Which of the ``others`` mean the same as ``one``: numbers, terms with symbols, tuples, sets, equations.

    Numbers are the same within the relative ``tolerance``. Terms with symbols are compared at four fixed
    points. "x = 5" is the same as "5".
    """
    return [_equal(one, other, tolerance) for other in others]


def _equal(one: str, other: str, tolerance: float) -> bool:
    try:
        return _same(_parse(one), _parse(other), tolerance)
    except _ERRORS:
        return False


_ERRORS = (ArithmeticError, AttributeError, TypeError, ValueError, RecursionError, MemoryError)


def _parse(text: str) -> Any:
    """The sympy tree. Raises NoValue for what the parser cannot read."""
    tree = _tree(text)
    if tree is None:
        raise NoValue("not an expression")
    return tree


@lru_cache(64)
def _tree(text: str) -> Any:
    from latex2sympy2_extended import latex2sympy

    try:
        return latex2sympy(text, normalization_config=None)
    except Exception:  # the parser raises it, bare, for a mistake in the text
        return None


def _same(one: Any, other: Any, tolerance: float) -> bool:
    from sympy import Eq, Expr, FiniteSet, Interval, Symbol, Tuple

    if isinstance(one, Eq) != isinstance(other, Eq):
        one, other = (e.rhs if isinstance(e, Eq) and isinstance(e.lhs, Symbol) else e for e in (one, other))
    if isinstance(one, Expr) and isinstance(other, Expr):
        return _same_term(one, other, tolerance)
    if isinstance(one, FiniteSet) and isinstance(other, FiniteSet):
        rest = list(other.args)
        for element in one.args:
            found = next((e for e in rest if _same(element, e, tolerance)), None)
            if found is None:
                return False
            rest.remove(found)
        return not rest
    pair = tuple(sorted((type(one).__name__, type(other).__name__)))
    if pair == ("Interval", "Tuple"):  # (3, 4) is parsed as an interval, (4, 3) as a tuple
        interval, both = (one, other) if isinstance(one, Interval) else (other, one)
        return len(both.args) == 2 and all(map(_same, interval.args[:2], both.args, [tolerance] * 2))
    if type(one) is not type(other) or not one.args or len(one.args) != len(other.args):
        return one == other
    if isinstance(one, Interval) and one.args[2:] != other.args[2:]:
        return False
    parts = 2 if isinstance(one, Interval | Eq) else len(one.args)
    known = isinstance(one, Interval | Eq | Tuple) or one.is_Relational
    return known and all(map(_same, one.args[:parts], other.args[:parts], [tolerance] * parts))


def _same_term(one: Any, other: Any, tolerance: float) -> bool:
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    compared = 0
    for first, factor in _PROBES if symbols else ((1.0, 1.0),):
        values = {symbol: first * factor**place for place, symbol in enumerate(symbols)}
        try:
            a, b = _number(one, values, _ALL), _number(other, values, _ALL)
        except (ArithmeticError, NoValue):
            continue
        compared += 1
        if a != b and abs(a - b) > tolerance * max(abs(a), abs(b)):
            return False
    return compared > 0


def _number(tree: Any, symbols: Mapping[Any, float], functions: Mapping[str, _Function]) -> Number:
    """A tree's value, ``symbols`` put in; raises NoValue or an ArithmeticError where it has none."""
    if tree in symbols:
        return symbols[tree]
    if tree.is_Rational:
        return Fraction(int(tree.p), int(tree.q))
    if tree.is_Float:
        return float(tree)
    name = type(tree).__name__
    if name == "Pi":
        return math.pi
    if name in _CONSTANTS and functions is _ALL:
        return _CONSTANTS[name]
    if tree.is_Pow and type(tree.base).__name__ == "Exp1":
        return functions["exp"](_number(tree.exp, symbols, functions))
    args = [_number(arg, symbols, functions) for arg in tree.args]
    if tree.is_Add:
        return sum(args)
    if tree.is_Mul:
        return _product(args)
    if name == "UnevaluatedExpr":
        return args[0]
    if tree.is_Pow:
        return _power(*args)
    if args and name in functions:
        return functions[name](*args)
    raise NoValue(f"{name} is not worked out")


def _product(args: list[Number]) -> Number:
    product: Number = Fraction(1)
    for arg in args:
        if isinstance(product, Fraction) and isinstance(arg, Fraction):
            product = product * arg if _bits(product) + _bits(arg) <= _BITS else float(product) * arg
        else:
            product = product * arg
    return product


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if _bits(base) * abs(exponent) <= _BITS:
            return base ** int(exponent)
        base = float(base)
    return base**exponent


def _bits(number: Fraction) -> int:
    return number.numerator.bit_length() + number.denominator.bit_length()


def _factorial(number: Number) -> Number:
    if not isinstance(number, Fraction) or number.denominator != 1 or number > _FACTORIAL:
        raise NoValue("a factorial of no small whole number")
    return Fraction(math.factorial(int(number)))


def _of_math(name: str) -> _Function:
    """The function of ``math``, or of ``cmath`` for complex numbers."""

    def function(*args: Number) -> Number:
        module = cmath if any(isinstance(arg, complex) for arg in args) else math
        return getattr(module, name)(*args)

    return function


def _one_over(function: _Function) -> _Function:
    return lambda *args: 1 / function(*args)


_Function = Callable[..., Number]
_NAMES = "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp log".split()
_OFFICIAL: dict[str, _Function] = {
    **{name: _of_math(name) for name in _NAMES},
    "floor": lambda x: Fraction(math.floor(x)),
    "factorial": _factorial,
}
_ALL: dict[str, _Function] = {
    **_OFFICIAL,
    "ceiling": lambda x: Fraction(math.ceil(x)),
    "Abs": lambda x: abs(x),
    "Max": lambda *args: max(args),
    "Min": lambda *args: min(args),
    "sec": _one_over(_OFFICIAL["cos"]),
    "csc": _one_over(_OFFICIAL["sin"]),
    "cot": _one_over(_OFFICIAL["tan"]),
}
_CONSTANTS = {"Exp1": math.e, "ImaginaryUnit": 1j}


def _answer(request: str) -> Any:
    name, *args = json.loads(request)
    return {"value": value, "equal": equal}[name](*args)


def _child(requests: int, replies: int, seconds: float) -> None:
    """Answer requests until there are no more; the kernel ends a child that computes longer than it may."""
    with open(requests, encoding="ascii") as lines, open(replies, "w", encoding="ascii") as out:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = json.dumps({"value": _answer(line)})
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(reply + "\n")
            out.flush()


class _Worker:
    """A forked child that computes; it starts in a hundredth of a second where an import takes seconds."""

    def __init__(self, seconds: float) -> None:
        theirs, requests = os.pipe()
        replies, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for unused in (0, 1, requests, replies):
                os.close(unused)
            try:
                _child(theirs, ours, seconds)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(ours)
        self._requests = os.fdopen(requests, "w", encoding="ascii")
        self._replies = os.fdopen(replies, encoding="ascii")

    def ask(self, request: str) -> str:
        """The reply, a line; "" where the child died of the question."""
        self._requests.write(request)
        self._requests.flush()
        return self._replies.readline()

    def bury(self) -> None:
        os.waitpid(self.pid, 0)
        self._replies.close()
        self._requests.close()


def main() -> None:
    """Arguments: seconds of computing for a request, bytes of memory, then folders to import from.

    Reads requests from the standard input, ``["equal", "1/2", ["0.5"], 1e-6]``, and writes a line for each,
    ``{"value": [true]}``, or ``{"ended": true}`` where time or memory ran out. Before them it writes
    ``{"ready": true}`` or ``{"error": ...}``.
    """
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    sys.path += [folder for folder in sys.argv[3:] if folder not in sys.path]
    try:
        import latex2sympy2_extended  # noqa: F401
    except ImportError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    _answer('["equal", "\\\\frac{1}{2}x", ["2^{-1}x"], 0]')  # fills the tables of the parser
    for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print('{"ready": true}', flush=True)
    worker = None
    for line in sys.stdin:
        worker = worker or _Worker(seconds)
        reply = worker.ask(line)
        if not reply:
            worker.bury()
            worker = None
        print(reply.strip() or '{"ended": true}', flush=True)


if __name__ == "__main__":
    main()
