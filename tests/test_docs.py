"""The front door and the docs: they build, their links and paths lead on, their code runs."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import start
import torch
import yaml
from helpers.tiny import byte_tokenizer, tiny_model

from opsdc import OPSDCConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")
WRITTEN = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *PAGES]
TREES = ("tests", "opsdc", "opsdc_kernels", "benchmarks", "examples", "docs")


def prose(path):
    """The text of a page without HTML comments."""
    return re.sub(r"<!--.*?-->", "", path.read_text("utf-8"), flags=re.DOTALL)


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def missing_paths(text):
    """Paths of the repository, and modules after `python -m`, that a text names and are not there.

    Shell patterns must match something; a test may be named down to its function.
    """
    named = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(TREES)})/[\w./*-]*[\w*/])", text))
    missing = {path for path in named if not list(ROOT.glob(path.rstrip("/")))}
    for module in re.findall(rf"python -m ((?:{'|'.join(TREES)})[\w.]*\w)", text):
        file = ROOT.joinpath(*module.split("."))
        if not (file.with_suffix(".py").is_file() or (file / "__main__.py").is_file()):
            missing.add(module)
    return sorted(missing)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_path_is_there(path):
    assert missing_paths(prose(path)) == []


def test_a_path_that_is_not_there_is_seen():
    text = (
        "`tests/trainer/test_plan.py`, opsdc/recipes/*.yaml, docs/none*.md; python -m opsdc.nothing"
    )
    assert missing_paths(text) == ["docs/none*.md", "opsdc.nothing", "tests/trainer/test_plan.py"]


def test_the_readme_is_short_and_in_order():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 200
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == [
        "Install", "The demo", "Your data", "Your model", "Python", "The loss", "Where to read on",
    ]  # fmt: skip
    assert "![" in README.read_text("utf-8").split("\n## ")[0]


def test_the_readmes_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(README))
    assert len(targets) > 15
    assert [
        t for t in targets if "://" not in t and not (ROOT / t.partition("#")[0]).exists()
    ] == []


def test_the_readme_lists_every_page_and_every_extra():
    text = README.read_text("utf-8")
    assert [path.name for path in PAGES if f"(docs/{path.name})" not in text] == []
    extras = re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    assert len(extras) > 8
    assert [name for name in extras if f"`{name}`" not in text.split("\n## ")[1]] == []


def test_the_site_has_at_most_fourteen_pages():
    # Material's own tags in the file are none of ours.
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    named = [page for entry in nav for page in entry.values()]
    assert sorted(named) == sorted(path.name for path in PAGES)
    assert len(named) <= 14


class Links(HTMLParser):
    """Where a page leads, and the places in it."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.places, self.loaded = [], set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.append(value)
                if tag != "a":
                    self.loaded.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def dead_links(site):
    """(page, target) of every link inside a built site whose file or place is not there."""
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for path, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file() or (
                parts.fragment
                and file in pages
                and unquote(parts.fragment) not in pages[file].places
            ):
                dead.append((path.name, target))
    return dead


@pytest.mark.whole
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert dead_links(tmp_path / "site") == []
    # Nothing is loaded from elsewhere.
    loaded = [x for path in (tmp_path / "site").rglob("*.html") for x in Links(path).loaded]
    assert [target for target in loaded if urlsplit(target).netloc] == []
    page = (tmp_path / "site" / "api.html").read_text("utf-8")
    assert "token_weight" in page
    # The same check on a site with a link and a place that are not there.
    page = (tmp_path / "site" / "index.html").read_text("utf-8")
    more = '<a href="none.html">x</a><a href="data.html#none">y</a></body>'
    (tmp_path / "site" / "index.html").write_text(page.replace("</body>", more), "utf-8")
    assert dead_links(tmp_path / "site") == [
        ("index.html", "none.html"), ("index.html", "data.html#none"),
    ]  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """Settings that put the tiny model and cheap sizes in the place of a page's."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [{"problem": f"What is {a} + {a + 3}?", "answer": str(2 * a + 3)} for a in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "model.name_or_path": str(tmp_path / "tiny"),
        "model.dtype": "float32",
        "data.source": "my.jsonl",
        "data.eval_size": 4,
        "data.gate_size": 0,
        "rollout.prompts_per_step": 4,
        "rollout.max_new_tokens": 8,
        "train.steps": 2,
        "train.max_tokens_per_micro_batch": 400,
        "eval.every": 1,
        "eval.max_new_tokens": 8,
        "eval.batch_size": 8,
    }


def test_each_yaml_block_is_a_configuration(tmp_path):
    found = [(path.name, block) for path in WRITTEN for block in blocks(path, "yaml")]
    assert len(found) >= 3
    for _, block in found:
        (tmp_path / "my.yaml").write_text(block, "utf-8")
        OPSDCConfig.load(tmp_path / "my.yaml")


@pytest.mark.whole
def test_the_readmes_yaml_trains(tiny, tmp_path, monkeypatch):
    (block,) = blocks(README, "yaml")
    assert len(block.splitlines()) <= 10
    (tmp_path / "my.yaml").write_text(block, "utf-8")
    monkeypatch.chdir(tmp_path)
    from opsdc.cli import main

    flags = [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    assert main(["train", "--config", "my.yaml", *flags]) == 0
    assert (tmp_path / "runs" / "my" / "model" / "config.json").is_file()


@pytest.mark.whole
def test_the_readmes_python_runs(tiny, tmp_path, monkeypatch):
    training, loss = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    load = OPSDCConfig.load

    def load_tiny(source, overrides=None):
        return load(source, {**(overrides or {}), **tiny})

    monkeypatch.setattr(OPSDCConfig, "load", load_tiny)
    names = {}
    exec(training, names)
    assert names["summary"]["steps"] == 2
    assert (tmp_path / "my-concise-model" / "config.json").is_file()

    model, _ = start.load()
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    names = {"student_hidden": states[0].requires_grad_(), "teacher_hidden": states[1],
             "head": model.lm_head}  # fmt: skip
    exec(loss, names)
    assert float(names["loss"].detach()) > 0
    assert model.lm_head.weight.grad is not None
