"""Export and push, of real runs; the Hub is a server on this machine that speaks its HTTP API."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from opsdc.cli import main
from opsdc.config.settings import OPSDCConfig
from opsdc.errors import ConfigError, ModelError
from opsdc.eval.card import _measured
from opsdc.models.export import export_model

pytestmark = pytest.mark.whole


def train(out, folder, problem_file, *more):
    flags = {
        "output_dir": out,
        "model.name_or_path": folder,
        "data.source": problem_file,
        "data.eval_size": 4,
        "data.gate_size": 0,
        "prompt.instruction": "Be brief, not verbose.",
        "rollout.prompts_per_step": 4,
        "rollout.max_new_tokens": 8,
        "train.steps": 2,
        "train.keep_best": "false",
        "eval.problems": 4,
        "eval.every": 0,
        "eval.max_new_tokens": 8,
        # Large, so that what is trained is no rounding.
        "optim.lr": 1e-2,
    }
    arguments = [part for k, v in flags.items() for part in (f"--{k}", str(v))]
    assert main(["train", *arguments, *more]) == 0
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, problem_file):
    return train(tmp_path_factory.mktemp("whole") / "run", tiny_folder, problem_file)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_folder, problem_file):
    """Trained from where the base has a relative name."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    before = os.getcwd()
    os.chdir(tiny_folder.parent)
    try:
        return train(out, f"./{tiny_folder.name}", problem_file, "--model.lora.r", "4")
    finally:
        os.chdir(before)


def test_every_model_has_a_card_with_base_figures_and_recipe(whole, tiny_folder):
    card = ModelCard.load(whole / "model" / "README.md")
    # A folder of this machine is no name on the Hub, and where it lies is private.
    assert card.data.base_model is None
    assert tiny_folder.name in card.text
    assert str(tiny_folder.parent) not in str(card)
    assert card.data["library_name"] == "transformers"
    assert "opsdc" in card.data.tags
    summary = json.loads((whole / "summary.json").read_text())
    tokens = [r for r in card.data.eval_results if "tokens" in r.metric_type]
    assert tokens[0].metric_value == round(summary["trained"]["tokens_mean"], 4)
    for words in (
        "Be brief, not verbose.",
        "| base |",
        "4 held-out problems",
        "2 steps",
        "torch 2",
    ):
        assert words in card.text


def test_a_licence_is_the_bases(tmp_path, tiny_folder, problem_file, tokenizer):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    run = train(tmp_path / "run", base, problem_file, "--eval.problems", "0")
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results is None
    assert "What was measured" not in card.text


def test_a_card_that_cannot_be_written_fails_no_run(tmp_path, tiny_folder, problem_file, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    run = train(tmp_path / "run", base, problem_file, "--eval.problems", "0")
    assert (run / "summary.json").is_file()
    assert "has no card" in capsys.readouterr().err


def test_an_export_is_read_by_pipeline_in_the_dtype_asked_for(whole, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["export", str(whole), "--output", str(out)]) == 0
    assert "read back" in capsys.readouterr().out
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert (out / "README.md").is_file()
    ask = pipeline("text-generation", model=str(out))
    said = ask([{"role": "user", "content": "What is 1 + 4?"}], max_new_tokens=4)
    assert said[0]["generated_text"][-1]["role"] == "assistant"


def test_float32_is_what_was_trained(whole, tmp_path):
    config = OPSDCConfig.load(whole / "config.yaml").model
    moved = export_model(config, whole / "model", tmp_path / "x", merge=False, dtype="float32")
    assert moved == 0.0
    trained = load_file(whole / "model" / "model.safetensors")
    exported = load_file(tmp_path / "x" / "model.safetensors")
    assert all(exported[name].equal(t) for name, t in trained.items())


def test_an_adapter_names_its_base_by_the_whole_path(adapted, tiny_folder):
    config = json.loads((adapted / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder.resolve())
    assert ModelCard.load(adapted / "model" / "README.md").data["library_name"] == "peft"


def test_a_merged_adapter_is_a_model_of_its_own(adapted, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    out = tmp_path / "merged"
    arguments = ["export", str(adapted), "--merge", "--dtype", "float32", "--output", str(out)]
    assert main(arguments) == 0
    assert not (out / "adapter_config.json").exists()
    assert ModelCard.load(out / "README.md").data["library_name"] == "transformers"
    ids = torch.tensor([[3, 5, 8, 13]])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    merged = AutoModelForCausalLM.from_pretrained(out)
    import peft

    with torch.no_grad():
        plain = base(ids).logits
        wanted = peft.PeftModel.from_pretrained(base, adapted / "model").eval()(ids).logits
        got = merged(ids).logits
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="is there already"):
        export_model(
            OPSDCConfig.load(adapted / "config.yaml").model,
            adapted / "model", out, merge=True, dtype="float32",
        )  # fmt: skip


def test_a_merge_that_changes_the_model_is_refused(adapted, tiny_folder, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tiny_folder.parent)
    config = OPSDCConfig.load(adapted / "config.yaml").model
    right = peft.tuners.tuners_utils.BaseTuner.merge_and_unload

    def wrong(tuner, **options):
        merged = right(tuner, **options)
        merged.model.layers[0].mlp.up_proj.weight.data.mul_(1.05)
        return merged

    monkeypatch.setattr(peft.tuners.tuners_utils.BaseTuner, "merge_and_unload", wrong)
    with pytest.raises(ModelError, match="changes when it is merged"):
        export_model(config, adapted / "model", tmp_path / "x", merge=True, dtype="float32")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--trained", "./none"], "no trained model in none"),
    ],
)
def test_export_refuses_in_one_line(whole, arguments, words, capsys):
    assert main(["export", str(whole), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


class Hub(BaseHTTPRequestHandler):
    """What of the Hub's HTTP API an upload of small files asks for."""

    files: ClassVar[dict] = {}
    created: ClassVar[list] = []
    status = 200

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith("/api/models/maker/base"):
            self.answer({"id": "maker/base", "cardData": {"license": "apache-2.0"}, "siblings": []})
        else:
            self.answer({"id": "me/short", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if type(self).status != 200:
            self.answer({"error": "Invalid username or password."}, type(self).status)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"{self.root()}/me/short", "id": "me/short", "name": "me/short"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.answer({
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in asked
                ]
            })  # fmt: skip
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({
                "commitUrl": f"{self.root()}/me/short/commit/1", "commitOid": "1", "success": True,
                "hookOutput": "", "pullRequestUrl": None,
            })  # fmt: skip
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def root(self):
        return f"http://{self.headers['Host']}"


@pytest.fixture
def hub():
    Hub.files, Hub.created, Hub.status = {}, [], 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def is_private(created):
    """Older versions of huggingface_hub send the first, newer ones the second."""
    return created.get("private") is True or created.get("visibility") == "private"


def push(hub, *arguments):
    """The command in a process of its own: the Hub's address is read when the package is loaded."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "opsdc", "push", *map(str, arguments)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_push_uploads_every_file_and_is_private(whole, hub):
    done = push(hub, whole, "me/short")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/short")
    assert is_private(Hub.created[0])
    for file in (whole / "model").iterdir():
        assert Hub.files[file.name] == file.read_bytes()


def test_push_writes_the_licence_of_a_base_on_the_hub(whole, hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (whole / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = ModelCard.load(folder / "README.md")
    card.data.base_model = "maker/base"
    card.save(folder / "README.md")
    done = push(hub, folder, "me/short", "--public")
    assert done.returncode == 0, done.stderr
    assert not is_private(Hub.created[0])
    assert b"license: apache-2.0" in Hub.files["README.md"]


def test_push_says_what_the_hub_says(whole, hub):
    Hub.status = 401
    done = push(hub, whole, "me/short")
    assert done.returncode == 2
    assert "me/short is not uploaded: " in done.stderr
    assert "hf auth login" in done.stderr
    assert Hub.files == {}


def test_push_refuses_what_others_could_not_load(adapted, tmp_path, capsys):
    assert main(["push", str(adapted), "me/short"]) == 2
    assert "is on this machine only" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "me/short"]) == 2
    assert "has no weights" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["push", str(tmp_path), "me/short"]) == 2
    assert "has no README.md" in capsys.readouterr().err


def test_the_help_of_both_teaches(capsys):
    for command in ("export", "push"):
        done = subprocess.run(
            [sys.executable, "-m", "opsdc", command, "--help"], capture_output=True, text=True
        )
        assert f"opsdc {command} runs/" in done.stdout


def test_an_adapter_alone_is_copied_and_nothing_else_is_claimed(adapted, tmp_path, capsys):
    out = tmp_path / "alone"
    assert main(["export", str(adapted), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the adapter as it is" in said
    assert "read back" not in said
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (adapted / "model" / weights).read_bytes()


@pytest.mark.parametrize("saved", [0.4, -0.25])
def test_a_card_gives_savings_their_own_sign_and_few_problems_no_interval(saved):
    arm = {"tokens_mean": 10.0, "accuracy": 0.5, "truncated": 0.0}
    compared = {"problems": 4, "token_reduction": saved, "token_reduction_ci95": [saved, saved]}
    summary = dict.fromkeys(("base", "prompt_only", "trained"), arm)
    summary["compared_with_base"] = {"trained": compared}
    text = _measured(summary)[1]
    assert f"saved against the base: {100 * saved:.1f} % (too few problems" in text
