"""The process behind `opsdc.eval.grader`: compares answers where a hostile one can do no harm.

One JSON request per line on standard input, one JSON reply per line on the original standard
output. It is a process because a model's answer such as 9^9^9^9 can keep a computer algebra system
in C code, where neither a thread nor a Python signal handler ends it; the kernel ends this process
when a request has used its CPU seconds. CPU time, not wall time: a busy machine must not turn right
answers into wrong ones.

Run as a file, never imported, so that nothing of a model or a GPU is loaded here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

_CPU_LIMIT_S = 3.0  # A usual comparison takes 0.01, one in a thousand 0.3.
_MEMORY_LIMIT_BYTES = 8 << 30


class _NoEval:
    """Lets no text become Python while a model's answer is being looked at, numerals excepted.

    Several of reasoning-gym's scorers call eval() on the answer, and so does sympy's parse_expr,
    through which math-verify reads "1/2". Python announces every compilation to audit hooks.
    """

    # What sympy makes of numerals and arithmetic: "Integer (1 )/Integer (2 )", "Float ('0.5' )".
    _ARITHMETIC = re.compile(
        r"from sympy import \*|(?:(?:Integer|Float)(?= *\()|[\d\s.+\-*/()',]|(?<=\d)[eE])*"
    )
    # These compile code they wrote themselves: multiplication of monomials, lazy class definitions.
    _GENERATORS = frozenset({"sympy.polys.monomials", "collections", "dataclasses"})

    def __init__(self) -> None:
        self.armed = False
        self.refused = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event != "compile":
            return
        source, filename = arguments
        # A lazy import compiles a file, which has a name. A syntax tree (None) was parsed before.
        if source is None or not str(filename).startswith("<"):
            return
        if sys._getframe(1).f_globals.get("__name__") in self._GENERATORS:
            return
        text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source)
        if not self._ARITHMETIC.fullmatch(text):
            self.refused = True
            raise PermissionError("an answer is not evaluated as Python")

    def __enter__(self) -> _NoEval:
        self.armed, self.refused = True, False
        return self

    def __exit__(self, *_: object) -> None:
        self.armed = False


def _math_verify(gold: str, texts: list[str], no_eval: _NoEval) -> dict[str, Any]:
    """Per text: does math-verify find the gold answer in it, and what did it find?"""
    with _cpu_limit(), no_eval:
        return {"results": [_compare(gold, text) for text in texts]}


def _compare(gold: str, text: str) -> list[Any]:
    import math_verify

    found = math_verify.parse(text, parsing_timeout=None)
    correct = math_verify.verify(_parse_gold(gold), found, timeout_seconds=None)
    # The last entry is the text that was parsed, the ones before it what became of it.
    return [bool(correct), str(found[-1]) if found else None]


@functools.lru_cache(maxsize=4)
def _parse_gold(gold: str) -> Any:
    import math_verify

    return math_verify.parse(gold, parsing_timeout=None)


def _load_math_verify() -> None:
    logging.disable(logging.CRITICAL)
    # First use builds grammars and tables; that must not count against the first answer.
    _compare(r"\boxed{\frac{1}{2}}", "The answer is 2/4.")


def _reasoning_gym(entry: dict[str, Any], answer: str, no_eval: _NoEval) -> dict[str, Any]:
    """The task's own score of an answer to its problem number `index`, made again from its seed."""
    task, options = entry["task"], json.dumps(entry["options"])
    dataset = _dataset(task, options)
    problem = dataset[entry["index"]]
    if (task, options) not in _usable_tasks:
        # A scorer that cannot do without eval() would find every answer wrong: say so at once.
        _score(dataset, str(problem["answer"]), problem, no_eval)
        if no_eval.refused:
            return {"unusable": True}
        _usable_tasks.add((task, options))
    return {"score": _score(dataset, answer, problem, no_eval)}


_usable_tasks: set[tuple[str, str]] = set()


def _score(dataset: Any, answer: str, problem: dict[str, Any], no_eval: _NoEval) -> float:
    with _cpu_limit(), no_eval:
        try:
            return float(dataset.score_answer(answer, problem))
        except Exception:  # A scorer that cannot read an answer has found it wrong.
            return 0.0


@functools.lru_cache(maxsize=4)
def _dataset(task: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(options))


@contextlib.contextmanager
def _cpu_limit() -> Any:
    # No handler is installed: the default action of SIGPROF ends the process, in C code too.
    signal.setitimer(signal.ITIMER_PROF, _CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(request: dict[str, Any], no_eval: _NoEval, loaded: set[str]) -> dict[str, Any]:
    kind = request["kind"]
    try:
        if kind not in loaded:
            if kind == "math_verify":
                _load_math_verify()
            else:
                import reasoning_gym  # noqa: F401
            loaded.add(kind)
    except ImportError as error:
        return {"missing": error.name}
    if kind == "math_verify":
        return _math_verify(request["gold"], request["texts"], no_eval)
    return _reasoning_gym(request["entry"], request["answer"], no_eval)


def _main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What a library prints must not become a reply.
    no_eval, loaded = _NoEval(), set[str]()
    with contextlib.suppress(ValueError, OSError):  # A lower limit is already in force.
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    for line in sys.stdin.buffer:
        try:
            reply = _reply(json.loads(line), no_eval, loaded)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)  # As if the kernel had: nothing here is sound now.
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    _main()
