import functools
import math
import re
from dataclasses import FrozenInstanceError, asdict, replace
from operator import attrgetter
from pathlib import Path

import pytest

from opsdc.cli import main
from opsdc.config.describe import flags, ignored_settings, page
from opsdc.config.fields import MustBe, UsedWith, fields_of, section_in
from opsdc.config.settings import (
    LoRAConfig,
    LossConfig,
    ModelConfig,
    OPSDCConfig,
    OptimConfig,
    TrainConfig,
)
from opsdc.config.yaml_file import recipe_names
from opsdc.errors import ConfigError

SETTINGS = {n: field for n, field in fields_of(OPSDCConfig).items() if not section_in(field)}


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def test_yaml_floats_written_as_people_write_them(tmp_path):
    path = write(
        tmp_path, "optim: {lr: 1e-6, weight_decay: 1.0e-2}\nrollout: {max_new_tokens: 1e3}"
    )
    config = OPSDCConfig.load(path)
    assert config.optim.lr == 1e-6
    assert config.rollout.max_new_tokens == 1000


def test_flags_win_over_the_file(tmp_path):
    path = write(tmp_path, "optim: {lr: 1e-6}\ntrain: {steps: 7}")
    config = OPSDCConfig.load(path, {"optim.lr": "2e-6", "data.options": "{size: 5}"})
    assert (config.optim.lr, config.train.steps) == (2e-6, 7)
    assert config.data.options == {"size": 5}


def test_resolved_config_round_trips(tmp_path):
    config = OPSDCConfig.load("qwen3-8b-lora", {"model.lora.r": "8"})
    assert OPSDCConfig.load(write(tmp_path, config.to_yaml())) == config
    assert config.model.lora.r == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {step: 3}", ["train.step", "train.steps"]),
        ("stpes: 3", ["unknown key 'stpes'"]),
        ("learning_rate: 1e-6", ["optim.lr"]),
        ("rollout: {max_completion_length: 5}", ["rollout.max_new_tokens"]),
        ("optim: {lr: 1e-6, lr: 2e-6}", ["'lr' appears twice"]),
        ("optim:\n  lr: fast", ["optim.lr", "a number", "'fast'"]),
        ("optim: {lr: .nan}", ["optim.lr", "finite"]),
        ("train: {steps: 2.5}", ["train.steps", "whole number"]),
        ("train: {steps: yes}", ["train.steps", "whole number"]),
        ("train: {steps: 0}", ["train.steps", "at least 1"]),
        ("model: {trust_remote_code: 1}", ["trust_remote_code", "true or false"]),
        ("loss: {divergence: kl}", ["loss.divergence", "reverse_kl"]),
        ("loss: {beta: 1.0}", ["loss.beta", "(0, 1)"]),
        ("loss: {token_share: 0}", ["loss.token_share", "(0, 1]"]),
        ("loss: {token_share: 20}", ["loss.token_share", "(0, 1]"]),
        ("loss: {token_criterion: kl}", ["loss.token_criterion", "divergence"]),
        ("optim: [1, 2]", ["optim", "section"]),
        ("- 1", ["expected sections"]),
        ("a: [", ["not YAML"]),
        ("eval: {problems: 65}", ["eval.problems", "64"]),
        ("model: {name_or_path: null}", ["name_or_path", "must be set"]),
        ("12: 3", ["not text"]),
    ],
)
def test_mistakes_are_named(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        OPSDCConfig.load(write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_missing_file_names_the_recipes(tmp_path):
    with pytest.raises(ConfigError, match="smollm2-cpu"):
        OPSDCConfig.load(tmp_path / "none.yaml")


def test_yaml_builds_no_objects(tmp_path):
    with pytest.raises(ConfigError):
        OPSDCConfig.load(write(tmp_path, "seed: !!python/object/apply:os.getpid []"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_resolve_and_set_nothing_in_vain(name):
    assert ignored_settings(OPSDCConfig.load(name)) == []


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-14b"])
def test_paper_recipes_hold_the_paper_values(name):
    c = OPSDCConfig.load(name)
    assert (c.optim.lr, c.optim.weight_decay, c.optim.grad_clip) == (1e-6, 0.01, 1.0)
    assert (c.optim.betas, c.optim.schedule, c.optim.warmup_steps) == ((0.9, 0.999), "constant", 0)
    assert (c.rollout.prompts_per_step, c.rollout.samples_per_prompt) == (32, 1)
    assert (c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p) == (8192, 1.0, 1.0)
    assert (c.teacher.mode, c.teacher.refresh_steps, c.train.steps) == ("refresh", 50, 100)
    assert (c.loss.divergence, c.prompt.enable_thinking) == ("reverse_kl", True)
    assert (c.eval.temperature, c.eval.top_p, c.eval.top_k, c.eval.samples) == (0.6, 0.95, 20, 8)


def test_a_setting_without_effect_is_said():
    changes = {"loss.beta": 0.3, "loss.token_criterion": "entropy", "teacher.refresh_steps": 7}
    notes = " ".join(ignored_settings(OPSDCConfig.load("smollm2-cpu", changes)))
    assert "teacher.refresh_steps" in notes
    assert "loss.beta" in notes
    assert "loss.token_criterion" in notes


def test_every_setting_has_a_flag_and_a_help_text():
    found = flags()
    assert {"output_dir", "seed", "model.name_or_path", "train.steps"} <= set(found)
    assert all(text for _, _, text in found.values())
    # Whole sentences: the help and the page print them as they are.
    assert all(re.match(r"[A-Z].*\. \(default: .+\)$", text) for _, _, text in found.values())


REFUSED = {
    "teacher.against": ["", " "],
    "teacher.model": ["", " "],
    "output_dir": ["", " \n"],
    "model.name_or_path": ["", " \n"],
    "prompt.instruction": ["", " \n"],
    "prompt.date": ["", "30 June", "2025-6-3", "2025-02-30", "20250630"],
    "rollout.server_address": ["host", "host:", "host:x", "1"],
    "optim.betas": [(0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.5)],
}
"""What the rules in words refuse."""


def just_outside(name):
    """(value, rule) pairs around the range of a setting, with the rule written anew."""
    for mark in SETTINGS[name].metadata:
        if isinstance(mark, MustBe):
            return [(value, mark.rule) for value in REFUSED[name]]
    kind = int if flags()[name][0] == "N" else float

    def next_to(limit, direction):
        return limit + direction if kind is int else math.nextafter(limit, direction * math.inf)

    (low, least), *rest = [
        (bound, getattr(mark, bound))
        for mark in SETTINGS[name].metadata
        for bound in ("ge", "gt", "lt", "le")
        if hasattr(mark, bound)
    ]
    below = kind(next_to(least, -1) if low == "ge" else least)
    if not rest:
        return [(below, f"{'at least' if low == 'ge' else 'above'} {least}")]
    ((high, most),) = rest
    above = kind(next_to(most, 1) if high == "le" else most)
    rule = f"in {'[' if low == 'ge' else '('}{least}, {most}{']' if high == 'le' else ')'}"
    return [(below, rule), (above, rule)]


def with_a_range():
    return [n for n, f in SETTINGS.items() if any(not isinstance(m, UsedWith) for m in f.metadata)]


@pytest.mark.parametrize(
    ("name", "value", "rule"), [(n, *case) for n in with_a_range() for case in just_outside(n)]
)
def test_a_value_just_outside_is_refused_however_it_is_given(name, value, rule):
    *path, key = name.split(".")
    config = OPSDCConfig(model=ModelConfig(lora=LoRAConfig()))
    section = attrgetter(".".join(path))(config) if path else config
    tree = {key: value}
    for part in reversed(path):
        tree = {part: tree}
    # A list as a flag is text.
    flag = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    for given in (
        lambda: type(section)(**{key: value}),
        lambda: replace(section, **{key: value}),
        lambda: OPSDCConfig.from_dict(tree, "run.yaml"),
        lambda: OPSDCConfig.load("smollm2-cpu", {name: flag}),
    ):
        with pytest.raises(ConfigError) as error:
            given()
        assert str(error.value).endswith(f"{name} must be {rule}, got {value!r}")


def test_every_number_has_a_range():
    """But these: any whole number scales, the loss judges its scratch, a band has two ends."""
    numbers = {name for name, (metavar, *_) in flags().items() if metavar in ("N", "X")}
    free = {"model.lora.alpha", "loss.workspace_bytes"}
    assert numbers - set(with_a_range()) == free


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        ("model", {"quantize": "nf4"}, "model.lora must be set with model.quantize"),
        ("rollout", {"server_address": "host:1"}, "rollout.weights_dir must be a folder"),
        ("loss", {"skip_tolerance": 0.1, "divergence": "jsd"},
         "loss.divergence must be reverse_kl with loss.skip_tolerance, got 'jsd'"),
        ("loss", {"columns": "unbiased", "divergence": "jsd"},
         "loss.divergence must be reverse_kl with loss.columns unbiased, got 'jsd'"),
        ("loss", {"columns": "bounded"},
         "loss.skip_tolerance must be set with loss.columns bounded, got None"),
        ("loss", {"columns": "exact", "skip_tolerance": 0.1},
         "loss.skip_tolerance must be unset with loss.columns exact, got 0.1"),
        ("loss", {"skip_tolerance": 0.1, "backend": "fused"},
         "loss.backend must be auto or chunked with loss.skip_tolerance, got 'fused'"),
        ("teacher", {"model": "a/b"}, "teacher.mode must be frozen with teacher.model: no update "
         "of the student reaches another model, got 'refresh'"),
        ("teacher", {"model": "a/b", "mode": "frozen", "gate": True},
         "teacher.gate must be false with teacher.model, which is never refreshed, got True"),
        ("teacher", {"model": "a/b", "mode": "frozen", "anchor": 0.5},
         "teacher.anchor must be 0 with teacher.model"),
    ],
)  # fmt: skip
def test_rules_inside_a_section(section, changes, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        replace(getattr(OPSDCConfig(), section), **changes)
    with pytest.raises(ConfigError, match=f"^run.yaml: {re.escape(sentence)}"):
        OPSDCConfig.from_dict({section: changes}, "run.yaml")


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"model": {"quantize": "nf4", "lora": {}}, "distributed": {"strategy": "fsdp"}},
         "distributed.strategy must be ddp with model.quantize, got 'fsdp'"),
        ({"teacher": {"model": "a/b", "mode": "frozen"}, "distributed": {"strategy": "fsdp"}},
         "distributed.strategy must be ddp with teacher.model, got 'fsdp'"),
        ({"eval": {"problems": 9}, "data": {"eval_size": 8}},
         "eval.problems must be between 0 and data.eval_size (8), got 9"),
    ],
)  # fmt: skip
def test_rules_between_sections(tree, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        OPSDCConfig.from_dict(tree)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        OPSDCConfig(**tree)


def test_python_says_what_files_say():
    for call, sentence in (
        (lambda: TrainConfig(steps="many"), "train.steps must be a whole number, got 'many'"),
        (lambda: TrainConfig(steps=True), "train.steps must be a whole number, got True"),
        (lambda: TrainConfig(steps=None), "train.steps must be set, got null"),
        (lambda: TrainConfig(stepz=3), "unknown key 'train.stepz'; did you mean train.steps?"),
        (lambda: TrainConfig(lr=3), "unknown key 'train.lr'; did you mean optim.lr?"),
        (lambda: OptimConfig(learning_rate=3), "'optim.learning_rate'; here it is optim.lr"),
        (lambda: LoRAConfig(rank=3), "unknown key 'model.lora.rank'"),
        (lambda: OPSDCConfig(train=3), "train must be a section of keys, got 3"),
        (lambda: OPSDCConfig(train={"steps": 0}), "train.steps must be at least 1, got 0"),
        (lambda: LossConfig(divergence="kl"), "must be one of reverse_kl, forward_kl, jsd"),
        (lambda: OptimConfig(betas=["a", 1]), "optim.betas must be a list of numbers"),
        (lambda: OptimConfig(lr=math.inf), "optim.lr must be a finite number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            call()
    assert TrainConfig(steps="1e2").steps == 100
    with pytest.raises(FrozenInstanceError):
        TrainConfig().steps = 3
    with pytest.raises(TypeError):
        TrainConfig(3)


def test_a_model_is_a_key_and_records_hold_lists():
    build = functools.cache(lambda model: object())
    model = ModelConfig(lora=LoRAConfig(target_modules=["q_proj"]))
    assert build(model) is build(replace(model)) is not build(replace(model, lora=None))
    config = OPSDCConfig(model=model)
    assert asdict(config)["optim"]["betas"] == (0.9, 0.999)
    assert config.to_dict()["optim"]["betas"] == [0.9, 0.999]
    assert config.to_dict()["model"]["lora"]["target_modules"] == ["q_proj"]
    assert "betas:\n  - 0.9\n  - 0.999\n" in config.to_yaml()
    assert OPSDCConfig().data.options is not OPSDCConfig().data.options


NOTES = [
    ({"teacher.mode": "frozen", "teacher.refresh_steps": 7},
     "teacher.refresh_steps has no effect with teacher.mode frozen"),
    ({"teacher.mode": "ema", "teacher.refresh_plateau": 0.1},
     "teacher.refresh_plateau has no effect with teacher.mode ema"),
    ({"teacher.ema_decay": 0.5}, "teacher.ema_decay has no effect with teacher.mode refresh"),
    ({"teacher.mode": "live", "teacher.offload": True},
     "teacher.offload has no effect with teacher.mode live"),
    ({"loss.beta": 0.3}, "loss.beta has no effect with loss.divergence reverse_kl"),
    ({"rollout.memory_share": 0.5}, "rollout.memory_share has no effect with rollout.engine hf"),
    ({"rollout.timeout_s": 1, "rollout.engine": "vllm"},
     "rollout.timeout_s has no effect with rollout.engine vllm"),
    ({"rollout.weights_dir": "/tmp"}, "rollout.weights_dir has no effect with rollout.engine hf"),
    ({"rollout.server_address": "h:1", "rollout.weights_dir": "/tmp"},
     "rollout.server_address has no effect with rollout.engine hf"),
    ({"loss.exact_value_every": 2},
     "loss.exact_value_every has no effect without loss.skip_tolerance"),
    ({"teacher.target": 0.5, "optim.schedule": "linear"},
     "teacher.target steers nothing once optim.schedule linear has taken the rate to zero: it ends "
     "where it happens to be; constant holds it"),
    ({"loss.token_criterion": "entropy"},
     "loss.token_criterion has no effect with loss.token_share 1"),
    ({"guard.target_compression": 0.5},
     "guard.target_compression has no effect without eval.every and eval.problems"),
    ({"guard.max_accuracy_drop": 0.2},
     "guard.max_accuracy_drop has no effect without eval.every and eval.problems"),
    ({"teacher.mode": "frozen", "teacher.gate": True},
     "teacher.gate has no effect with teacher.mode frozen"),
    ({"train.steps": 50},
     "teacher.refresh_steps (50) is not below train.steps (50): the teacher stays frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "note"), NOTES)
def test_each_note_on_a_setting_without_effect(tmp_path, changes, note):
    empty = write(tmp_path, "")
    assert note in ignored_settings(OPSDCConfig.load(empty, changes))
    assert ignored_settings(OPSDCConfig.load(empty)) == []


def test_every_mark_is_about_a_setting_and_has_its_note():
    said = [note.split(" has no effect with ") for _, note in NOTES]
    for name, field in SETTINGS.items():
        for mark in (mark for mark in field.metadata if isinstance(mark, UsedWith)):
            assert set(mark.values) < set(flags()[mark.key][0].split("|"))
            assert any(s[0] == name and s[1].startswith(f"{mark.key} ") for s in said)


def test_the_page_of_settings_is_not_stale():
    path = Path(__file__).parents[2] / "docs" / "SETTINGS.md"
    assert path.read_text("utf-8") == page(), "python -m opsdc.config > docs/SETTINGS.md"
    assert all(f"| `{name}` |" in page() for name in SETTINGS)


def test_help_introduces_each_section(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for words in (
        "optim:\n  AdamW and its learning rate.\n",
        "--loss.divergence reverse_kl|forward_kl|jsd\n",
        "--optim.lr X          Learning rate; paper: 1e-6. (default: 1e-06; at least 0)",
        "--model.quantize nf4 ",
        "--log.report_to LIST ",
        "Only with teacher.mode refresh, frozen or ema. (default: false)",
    ):
        assert words in shown
