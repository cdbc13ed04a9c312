"""The laws of the house: which file may import which, each with a planted violation that fails.

Every import counts, those inside functions and those under `TYPE_CHECKING` too. A *room* is a
folder or a file directly below a package; a *floor* is a list of rooms. A file imports from its own
room and from lower floors.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "opsdc_kernels": [
        ["verify", "audit"],
        ["testing", "module"],
        ["api"],
        ["check"],
        ["columns"],
        ["chunked"],
        ["vocab_parallel"],
        ["plan"],
        ["auto"],
        ["row_pass", "fused"],
        ["products", "triton", "reference"],
        ["maths", "problem", "memory", "transforms"],
    ],
    "opsdc": [
        ["__main__"],
        ["cli"],
        ["commands"],
        ["train"],
        ["checks"],
        ["planner"],
        ["eval", "debug"],
        ["rollout"],
        ["record"],
        ["method"],
        ["ranks"],
        ["data", "models"],
        ["config"],
        ["errors"],
    ],
}
"""From the top. `__init__` of a package stands above all of them."""

READERS_OF_THE_REFERENCE = ("api", "verify", "testing")
"""What is checked never imports its judge."""

NOT_IN_THE_METHOD = ("vllm", "opsdc.planner", "opsdc.record", "opsdc.eval", "opsdc.debug")

LOSS_NAMES = ("linear_divergence", "linear_reverse_kl", "LinearDivergence", "LinearReverseKL")


def modules(root, package):
    """{dotted name: path} of every module of a package below `root`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, name, known):
    """(module, names taken from it or None) of every import in a file, wherever it stands.

    `from package import module` counts as an import of the module.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield f"{base}.{alias.name}", None
                else:
                    yield base, alias.name


def arrows(root, package):
    """{module: modules of the same package that it imports}."""
    known = modules(root, package)
    drawn = {}
    for name, path in known.items():
        taken = {module for module, _ in imports(path, name, known) if module in known}
        drawn[name] = taken - {name}
    return drawn


def room(module):
    return module.split(".")[1] if "." in module else "__init__"


def broken_floors(root, package):
    """Arrows that run up, or sideways to another room of the same floor; rooms without a floor."""
    floor_of = {name: i for i, floor in enumerate(FLOORS[package]) for name in floor}
    floor_of["__init__"] = -1
    wrong = []
    for module, targets in arrows(root, package).items():
        if room(module) not in floor_of:
            wrong.append(f"{module} is on no floor")
            continue
        for target in targets:
            if room(target) not in floor_of or room(target) == room(module):
                continue  # named when it is visited itself, or at home
            if floor_of[room(target)] <= floor_of[room(module)]:
                wrong.append(f"{module} imports {target}")
    return wrong


def circles(root, package):
    """Groups of modules that import one another, by Tarjan's strongly connected components."""
    graph = arrows(root, package)
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def readers_of_the_reference(root):
    known = modules(root, "opsdc_kernels")
    return [
        name
        for name, path in known.items()
        if name.split(".")[1:] not in [[reader] for reader in READERS_OF_THE_REFERENCE]
        and any(m == "opsdc_kernels.reference" for m, _ in imports(path, name, known))
    ]


def strangers_in_the_method(root):
    known = modules(root, "opsdc")
    return [
        f"{name} imports {module}"
        for name, path in known.items()
        if room(name) == "method"
        for module, _ in imports(path, name, known)
        if any(module == m or module.startswith(f"{m}.") for m in NOT_IN_THE_METHOD)
    ]


def callers_of_the_loss(root):
    """Modules of the trainer, but for its home, that take the loss from the kernels."""
    known = modules(root, "opsdc")
    return [
        name
        for name, path in known.items()
        if name != "opsdc.method.loss"
        and any(
            module in ("opsdc_kernels", "opsdc_kernels.api", "opsdc_kernels.module")
            and (taken is None or taken in (*LOSS_NAMES, "api", "module"))
            for module, taken in imports(path, name, known)
        )
    ]


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package):
    assert broken_floors(ROOT, package) == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_circle(package):
    assert circles(ROOT, package) == []


def test_only_api_and_the_judges_read_the_reference():
    assert readers_of_the_reference(ROOT) == []


def test_the_method_knows_no_operations():
    assert strangers_in_the_method(ROOT) == []


def test_one_caller_of_the_loss():
    assert callers_of_the_loss(ROOT) == []


def planted(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(tmp_path).parents:
            (tmp_path / folder).mkdir(exist_ok=True)
            if str(folder) != ".":
                (tmp_path / folder / "__init__.py").touch()
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "imported"),
    [
        ("opsdc/method/loss.py", "from opsdc.train import run", "opsdc/train.py"),
        ("opsdc/method/loss.py", "def f():\n    from opsdc.eval import arms", "opsdc/eval/arms.py"),
        ("opsdc/record/deep/er.py", "import opsdc.rollout.hf", "opsdc/rollout/hf.py"),
        ("opsdc/record/lines.py", "from ..rollout import hf", "opsdc/rollout/hf.py"),
        ("opsdc/data/text.py", "from opsdc import models", "opsdc/models/load.py"),
        ("opsdc_kernels/fused/op.py", "from opsdc_kernels import row_pass",
         "opsdc_kernels/row_pass/exact.py"),
        ("opsdc_kernels/row_pass/exact.py",
         "if TYPE_CHECKING:\n    import opsdc_kernels.columns.bounded",
         "opsdc_kernels/columns/bounded.py"),
    ],
)  # fmt: skip
def test_an_arrow_up_or_sideways_is_seen(tmp_path, file, line, imported):
    root = planted(tmp_path, {file: line, imported: ""})
    assert len(broken_floors(root, file.split("/")[0])) == 1


def test_a_room_without_a_floor_is_seen(tmp_path):
    root = planted(tmp_path, {"opsdc/utils.py": ""})
    assert broken_floors(root, "opsdc") == ["opsdc.utils is on no floor"]


def test_an_arrow_down_and_one_at_home_are_fine(tmp_path):
    root = planted(
        tmp_path,
        {
            "opsdc/method/loss.py": "from opsdc.method.batch import pack\nimport opsdc.errors",
            "opsdc/method/batch.py": "from opsdc.config import Config",
            "opsdc/config.py": "from .errors import ConfigError",
            "opsdc/errors.py": "",
        },
    )
    assert broken_floors(root, "opsdc") == []
    assert circles(root, "opsdc") == []


def test_a_circle_is_seen_under_type_checking_too(tmp_path):
    root = planted(
        tmp_path,
        {
            "opsdc/data/a.py": "from opsdc.data.b import B",
            "opsdc/data/b.py": "if TYPE_CHECKING:\n    from opsdc.data import c",
            "opsdc/data/c.py": "def f():\n    from opsdc.data.a import A",
        },
    )
    assert circles(root, "opsdc") == [["opsdc.data.a", "opsdc.data.b", "opsdc.data.c"]]


@pytest.mark.parametrize("reader", ["chunked/run", "row_pass/exact", "maths", "fused/verify"])
def test_a_pass_that_reads_its_judge_is_seen(tmp_path, reader):
    line = "def f():\n    from opsdc_kernels import reference"
    root = planted(tmp_path, {f"opsdc_kernels/{reader}.py": line, "opsdc_kernels/reference.py": ""})
    assert readers_of_the_reference(root) == [f"opsdc_kernels.{reader.replace('/', '.')}"]


@pytest.mark.parametrize("line", ["import vllm.engine", "from opsdc.record import checkpoint"])
def test_operations_in_the_method_are_seen(tmp_path, line):
    root = planted(tmp_path, {"opsdc/method/update.py": line, "opsdc/record/checkpoint.py": ""})
    assert len(strangers_in_the_method(root)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from opsdc_kernels import linear_divergence",
        "from opsdc_kernels.api import linear_reverse_kl",
        "import opsdc_kernels",
        "def f():\n    from opsdc_kernels import api",
    ],
)
def test_a_second_caller_of_the_loss_is_seen(tmp_path, line):
    root = planted(tmp_path, {"opsdc/method/update.py": line})
    assert callers_of_the_loss(root) == ["opsdc.method.update"]
    fine = planted(tmp_path, {"opsdc/method/update.py": "from opsdc_kernels.plan import estimate"})
    assert callers_of_the_loss(fine) == []
