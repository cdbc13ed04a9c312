"""Laws over the source: imports go one way, nothing is unpickled or evaluated."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("opsdc", "opsdc_kernels", "benchmarks")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    above = {"opsdc_kernels": ("opsdc", "benchmarks"), "opsdc": ("benchmarks",), "benchmarks": ()}
    for name in imports(ast.parse(path.read_text("utf-8"))):
        assert name.split(".")[0] not in above[package], f"{path} imports {name}"


def test_only_the_loss_module_calls_the_kernels():
    allowed = {"loss.py", "update.py", "preflight.py"}
    users = {
        p.name
        for p in SOURCES
        if p.parent.name == "opsdc"
        and any(n.startswith("opsdc_kernels") for n in imports(ast.parse(p.read_text("utf-8"))))
    }
    assert users <= allowed
    for path in SOURCES:
        if path.name != "loss.py" and path.parent.name == "opsdc":
            assert "linear_divergence(" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_bans(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec"), f"{path}:{node.lineno}"
            assert not name.startswith(("pickle.", "marshal.", "dill.")), f"{path}:{node.lineno}"
            assert name != "torch.load" or words.get("weights_only") == "True"
            assert name != "yaml.load" or words.get("Loader") == "_Loader"
            assert words.get("shell") != "True", f"{path}:{node.lineno}"
            assert words.get("trust_remote_code") != "True", f"{path}:{node.lineno}"
        if isinstance(node, ast.Constant):
            assert node.value != "0.0.0.0", f"{path}:{node.lineno}"
    assert not {"pickle", "dill", "marshal"} & set(imports(ast.parse(path.read_text("utf-8"))))


def test_kernels_import_without_triton_and_without_the_trainer():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "import torch, opsdc_kernels as k\n"
        "h, w, t = torch.randn(3, 8), torch.randn(11, 8), torch.randn(3, 8)\n"
        "assert float(k.linear_reverse_kl(h, w, t)) > 0\n"
        "assert not any(m.split('.')[0] == 'opsdc' for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
