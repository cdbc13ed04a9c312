"""Laws over the source: imports go one way, nothing is unpickled or evaluated."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("opsdc", "opsdc_kernels", "benchmarks")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
SHIPPED = [*SOURCES, *sorted((ROOT / "examples").rglob("*.py")), ROOT / "setup.py"]


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


# Modules that unpickle or run what they read. torch.distributed.checkpoint unpickles its metadata.
BANNED_MODULES = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch.distributed.checkpoint",
    "torch.package",
)
BANNED_CALLS = (
    *("eval", "exec", "compile", "__import__"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.hub.load", "torch.jit.load", "torch.export.load", "torch.serialization.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "importlib.import_module"),
)
# torch.distributed's ways to send Python objects, which arrive by unpickling.
OBJECT_COLLECTIVES = (
    *("all_gather_object", "gather_object", "broadcast_object_list"),
    *("scatter_object_list", "send_object_list", "recv_object_list"),
)
# Under their bare names the rules below would not know them.
BANNED_NAMES = (*BANNED_CALLS, "torch.load", "yaml.load", "numpy.load")
# Whose calls are known by the module's name: it must be the module's own.
UNALIASED = {name.split(".")[0] for name in BANNED_NAMES if "." in name} - {"numpy"}
# Setting them opens vLLM's developer routes or its pickled messages.
BANNED_VARIABLES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION")
# The one place that may name them: where they are refused.
REFUSAL = "_REFUSED"


def violations(source):
    """(line, what) of everything in a source text that this project does not do."""
    tree = ast.parse(source)
    refused = {
        constant
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == REFUSAL
        for constant in ast.walk(node)
    }
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for name in imports(tree):
        if any(name == m or name.startswith(f"{m}.") for m in BANNED_MODULES):
            yield 0, f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.asname and name.name in UNALIASED:
                    yield node.lineno, f"imports {name.name} under another name"
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                if f"{node.module}.{name.name}" in (*BANNED_MODULES, *BANNED_NAMES):
                    yield node.lineno, f"imports {node.module}.{name.name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_MODULES:
            yield node.lineno, f"uses {ast.unparse(node)}"
        # Given another name, or handed on, no rule below would see it called.
        is_read = isinstance(getattr(node, "ctx", None), ast.Load) and node not in called
        if is_read and ast.unparse(node) in BANNED_NAMES:
            yield node.lineno, f"takes {ast.unparse(node)} without calling it"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "0.0.0.0" in node.value or node.value == "::":
                yield node.lineno, "listens on every interface"
            if node not in refused and any(v in node.value for v in BANNED_VARIABLES):
                yield node.lineno, "names a variable that must be refused"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.split(".")[-1] in OBJECT_COLLECTIVES:
            yield node.lineno, f"calls {name}, which unpickles"
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in BANNED_CALLS:
            yield node.lineno, f"calls {name}"
        if name.endswith("torch.load") and words.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if name == "yaml.load" and words.get("Loader") != "_Loader":
            yield node.lineno, "yaml.load without the safe loader"
        if words.get("shell", "False") != "False":
            yield node.lineno, "a shell"
        if words.get("trust_remote_code") == "True":
            yield node.lineno, "trusts remote code"
        if words.get("allow_pickle", "False") != "False":
            yield node.lineno, "numpy unpickles"
        # Templates hold braces of others: only a literal of ours may be a format.
        is_format = isinstance(node.func, ast.Attribute) and node.func.attr in (
            "format",
            "format_map",
        )
        if is_format and not isinstance(node.func.value, ast.Constant):
            yield node.lineno, "str.format on a text that is no literal"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_bans(path):
    assert list(violations(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "importlib.import_module('pickle')",
        "dist.all_gather_object(found, mine)",
        "broadcast_object_list(found, src=0)",
        "load = torch.load",
        "import torch as t",
        "list(map(eval, answers))",
        "torch.serialization.load(path)",
        "torch.jit.load(path)",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "torch.load(path)",
        "from torch import load",
        "from yaml import load",
        "torch.distributed.checkpoint.load(state)",
        "builtins.eval(answer)",
        "subprocess.getoutput(command)",
        "os.environ.setdefault('VLLM_SERVER_DEV_MODE', '1')",
        "os.putenv('VLLM_ALLOW_INSECURE_SERIALIZATION', '1')",
        "serve('0.0.0.0:8000')",
        "template.format(problem=problem)",
        "template.format_map(problem)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(answer)",
        "exec(answer)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "serve(host='0.0.0.0')",
        "os.environ['VLLM_SERVER_DEV_MODE'] = '1'",
        "run(env={'VLLM_ALLOW_INSECURE_SERIALIZATION': '1'})",
        "template.text.format(problem=problem)",
    ],
)
def test_each_ban_catches_what_it_is_for(line):
    assert len(list(violations(line))) >= 1


def test_the_safe_loader_is_one():
    import yaml

    from opsdc.config.yaml_file import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in _Loader.yaml_constructors)


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
