"""Check this machine's backends against float64, and print their errors beside the naive ones.

python -m opsdc_kernels.verify              # about a minute on two CPU cores
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from opsdc_kernels import plan, testing
from opsdc_kernels.memory import PeakMemory
from opsdc_kernels.testing import Case, Errors, Outcome

DESCRIPTION = """\
Runs every backend that works on this machine on inputs like those of self-distillation, where
teacher and student are close, and compares loss and gradients with float64 on the same inputs.

Columns: loss, dH, dW: error relative to the truth's own size (Frobenius norm for gradients).
worst: the same for the worst single token. MiB: peak memory beside the inputs.
budget: the errors are within the budget of the dtype (`opsdc_kernels.testing.BUDGETS`).

The rows `naive bf16` and `naive fp32` show, for comparison only, materialized logits in that dtype
followed by log_softmax and Σ q·(log q − log p). All errors are for given hidden states: a bf16
backbone adds its own, which no loss can remove.
"""
EPILOG = """\
examples:
  python -m opsdc_kernels.verify                      all regimes, fp32 and bf16
  python -m opsdc_kernels.verify --dtype bfloat16 --vocab-size 151936 --dim 4096 --tokens 256
  python -m opsdc_kernels.verify --hidden-states real.safetensors

A file for --hidden-states holds `student_hidden` [N, D], `student_weight` [V, D], `teacher_hidden`
[N, D] and, if the heads differ, `teacher_weight`.

exit status: 0 if every backend is within its budget, 1 if not, 2 for wrong arguments.
"""
REGIMES = (
    ("far", 2.0, 1.0, 0.0),
    ("training", 0.5, 1e-2, 0.0),
    ("near", 1.0, 1e-4, 0.0),
    ("peaked", 0.05, 1e-5, 0.0),
    ("common row in W", 1.0, 1e-3, 2.0),
)
"""(name, student entropy, KL, common mode); entropies and KLs in nats per token."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        cases = list(_cases(options))
    except (OSError, KeyError, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    _print_heading(options, device)
    failed = []
    for name, case in cases:
        if not _check(name, case.to(device), options):
            failed.append(name)
    if failed:
        print(f"\nFAIL: over budget in {len(failed)} of {len(cases)} cases: {', '.join(failed)}")
        return 1
    print(f"\nPASS: every backend is within its budget in all {len(cases)} cases")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opsdc_kernels.verify",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, default=96, help="N (default %(default)s)")
    add("--dim", type=int, default=256, help="hidden size D (default %(default)s)")
    add("--vocab-size", type=int, default=16384, help="V (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16", "all"), default="all",
        help="of hidden states and heads; all: float32 and bfloat16 (default)")  # fmt: skip
    add("--backend", action="append", choices=("chunked", "fused", "reference"),
        help="check only this one; may be repeated (default: all that run here)")  # fmt: skip
    add("--divergence", choices=("reverse_kl", "forward_kl", "jsd"), default="reverse_kl",
        help="(default %(default)s; the naive rows are printed for reverse_kl only)")  # fmt: skip
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--hidden-states", type=Path, metavar="FILE.safetensors", help="also check real inputs")
    add("--seed", type=int, default=0, help="of the generated inputs (default %(default)s)")
    return parser


def _dtypes(options: argparse.Namespace) -> tuple[torch.dtype, ...]:
    if options.dtype == "all":
        return torch.float32, torch.bfloat16
    return (getattr(torch, options.dtype),)


def _cases(options: argparse.Namespace) -> list[tuple[str, Case]]:
    cases = []
    for dtype in _dtypes(options):
        for name, entropy, kl, common_mode in REGIMES:
            for shared in (True, False):
                title = f"{name}, {'shared head' if shared else 'two heads'}, {_short(dtype)}"
                try:
                    case = testing.make_case(
                        tokens=options.tokens,
                        dim=options.dim,
                        vocab_size=options.vocab_size,
                        entropy=entropy,
                        kl=kl,
                        dtype=dtype,
                        shared_head=shared,
                        common_mode=common_mode,
                        seed=options.seed,
                    )
                except testing.Unrepresentable as reason:
                    print(f"left out: {title}: {reason}")
                    continue
                cases.append((title, case))
        if options.hidden_states:
            case = _from_file(options.hidden_states).to(dtype)
            cases.append((f"{options.hidden_states.name}, {_short(dtype)}", case))
    return cases


def _from_file(path: Path) -> Case:
    tensors = load_file(path)
    names = ("student_hidden", "student_weight", "teacher_hidden")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}")
    student, weight, teacher = (tensors[name] for name in names)
    return Case(student, weight, teacher, tensors.get("teacher_weight"))


def _backends(device: torch.device, options: argparse.Namespace) -> tuple[str, ...]:
    if options.backend:
        return tuple(options.backend)
    return ("chunked", "reference", "fused") if device.type == "cuda" else ("chunked", "reference")


def _print_heading(options: argparse.Namespace, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads; "
        f"N {options.tokens}, D {options.dim}, V {options.vocab_size}, {options.divergence}"
    )
    print(
        "plan:",
        plan.estimate(
            tokens=options.tokens,
            vocab_size=options.vocab_size,
            student_dim=options.dim,
            device=device,
            dtype=_dtypes(options)[-1],
        ),
    )


def _check(title: str, case: Case, options: argparse.Namespace) -> bool:
    """Print the case's table; True if every backend is within the budget."""
    kind, device = options.divergence, case.student_hidden.device
    true = testing.truth(case, divergence=kind)
    limit = testing.budget(case, true)
    print(f"\n{title}: mean {kind} {float(true.per_token.mean()):.2e} nats")
    print(f"  {'':<12}{'loss':>9}{'dH':>9}{'dW':>9}{'worst':>9}{'MiB':>8}{'s':>8}  budget")
    good = True
    for backend in _backends(device, options):
        call = partial(testing.run, case, backend=backend, divergence=kind)
        outcome, peak_mib, seconds = _measured(call, device)
        errors = testing.errors(outcome, true)
        within = testing.within(errors, limit)
        good = good and within
        _print_row(backend, errors, peak_mib, seconds, "yes" if within else "NO")
    if kind == "reverse_kl":
        for dtype in (torch.bfloat16, torch.float32):
            outcome, peak_mib, seconds = _measured(partial(testing.naive, case, dtype), device)
            errors = testing.errors(outcome, true)
            _print_row(f"naive {_short(dtype)}", errors, peak_mib, seconds, "–")
    return good


def _print_row(name: str, errors: Errors, peak_mib: float, seconds: float, within: str) -> None:
    note = " (negative divergences)" if errors.negative else ""
    numbers = errors.loss, errors.hidden_gradient, errors.weight_gradient, errors.worst_row
    cells = "".join(f"{x:>9.1e}" for x in numbers)
    print(f"  {name:<12}{cells}{peak_mib:>8.0f}{seconds:>8.2f}  {within}{note}")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _measured(call: Callable[[], Outcome], device: torch.device) -> tuple[Outcome, float, float]:
    """The outcome, peak MiB beside what was held before, and seconds."""
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        outcome = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return outcome, memory.peak_mib, seconds


if __name__ == "__main__":
    sys.exit(main())
