import pytest

from opsdc.config import OPSDCConfig, flags, ignored_settings, recipe_names
from opsdc.errors import ConfigError


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
    assert (c.optim.betas, c.optim.schedule, c.optim.warmup_steps) == ([0.9, 0.999], "constant", 0)
    assert (c.rollout.prompts_per_step, c.rollout.samples_per_prompt) == (32, 1)
    assert (c.rollout.max_new_tokens, c.rollout.temperature, c.rollout.top_p) == (8192, 1.0, 1.0)
    assert (c.teacher.mode, c.teacher.refresh_steps, c.train.steps) == ("refresh", 50, 100)
    assert (c.loss.divergence, c.prompt.enable_thinking) == ("reverse_kl", True)
    assert (c.eval.temperature, c.eval.top_p, c.eval.top_k, c.eval.samples) == (0.6, 0.95, 20, 8)


def test_a_setting_without_effect_is_said():
    changes = {"teacher.mode": "frozen", "loss.beta": 0.3, "loss.token_criterion": "entropy"}
    notes = " ".join(ignored_settings(OPSDCConfig.load("smollm2-cpu", changes)))
    assert "teacher.refresh_steps" in notes
    assert "loss.beta" in notes
    assert "loss.token_criterion" in notes


def test_every_setting_has_a_flag_and_a_help_text():
    found = flags()
    assert {"output_dir", "seed", "model.name_or_path", "train.steps"} <= set(found)
    assert all(text for _, _, text in found.values())
