"""The notebook, in a kernel of its own: a tiny model in the place of the demo's."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "compress.ipynb"

pytestmark = pytest.mark.whole


def run(tmp_path, monkeypatch, **settings):
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("MODEL = ")
    first.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": tmp_path}}).execute()
    return "".join(
        output.get("text", "") + str(sorted(output.get("data", {})))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_every_cell_runs(tmp_path, monkeypatch, tiny_folder):
    said = run(tmp_path, monkeypatch, MODEL=str(tiny_folder), STEPS=2, EVERY=1, HELD_OUT=6)
    for words in ("the teacher's:", "tokens saved:", "kept step", "before, ", "image/png"):
        assert words in said
    assert (tmp_path / "runs" / "notebook" / "model" / "README.md").is_file()


@pytest.mark.model
@pytest.mark.slow
def test_on_the_demos_model_answers_become_shorter(tmp_path, monkeypatch, smollm2):
    said = run(tmp_path, monkeypatch, STEPS=6, EVERY=3, HELD_OUT=24)
    saved = float(said.split("tokens saved: ")[1].split(" %")[0])
    assert saved > 30


def test_it_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
