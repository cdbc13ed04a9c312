"""Whole runs on the tiny model: the record, resuming, what a run leaves, what it refuses."""

import json
import math

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from opsdc import train
from opsdc.config.settings import OPSDCConfig
from opsdc.debug.show import padded_layout, per_token
from opsdc.errors import ConfigError, DataError, TrainingError
from opsdc.record import checkpoint
from opsdc.record.lines import read_lines
from opsdc.train import OPSDCTrainer

pytestmark = pytest.mark.whole

KEYS = {
    "step",
    "loss_nats",
    "kl_p50",
    "kl_p90",
    "kl_p99",
    "student_entropy",
    "teacher_entropy",
    "agreement",
    "response_tokens_mean",
    "response_tokens_max",
    "truncated_share",
    "cut_share",
    "empty_share",
    "repeated_share",
    "grad_norm",
    "lr",
    "weights_version",
    "teacher_version",
    "skipped_steps",
}


def run(config, **kwargs):
    trainer = OPSDCTrainer(None, config, **kwargs)
    return trainer, trainer.train()


def record(folder):
    rows = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def parameters(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {n: p.detach() for n, p in model.named_parameters()}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_leaves_its_record(make_config, tmp_path):
    trainer, summary = run(make_config())
    out = tmp_path / "run"
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert {k for k in row if not k.startswith(("perf/", "base/", "eval/"))} == KEYS
        assert row["perf/seconds_step"] > 0
        assert row["loss_nats"] > 0
    assert rows[0]["base/tokens_mean"] == summary["base"]["tokens_mean"]
    # Refresh after the updates of steps 2 and 4.
    assert [row["teacher_version"] for row in rows] == [0, 2, 2, 4, 4]
    assert OPSDCConfig.load(out / "config.yaml") == trainer.config
    assert (out / "plot.png").stat().st_size > 10_000
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for arm in ("base", "prompt_only", "trained"):
        assert {"tokens_mean", "truncated", "accuracy"} <= set(summary[arm])
    assert len(read_lines(out / "rollouts.jsonl")) == 5 * 4
    loaded = parameters(out / "model")
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, loaded[name])
    assert AutoTokenizer.from_pretrained(out / "model").chat_template


@pytest.mark.parametrize("mode", ["refresh", "ema", "frozen", "live"])
def test_every_teacher_trains(make_config, mode, tmp_path):
    run(make_config(**{"teacher.mode": mode, "eval.problems": 0, "train.steps": 3}))
    rows = record(tmp_path / "run")
    assert all(row["loss_nats"] > 0 for row in rows)
    expected = {"refresh": [0, 2, 2], "ema": [1, 2, 3], "frozen": [0] * 3, "live": [1, 2, 3]}
    assert [row["teacher_version"] for row in rows] == expected[mode]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teacher.mode": "ema", "loss.token_share": 0.5},
        {"teacher.target": 0.3, "teacher.anchor": 0.2, "teacher.against": "Be wordy, please."},
    ],
    ids=str,
)
def test_resuming_at_any_step_changes_no_bit(make_config, tmp_path, settings):
    common = {"eval.problems": 0, "train.keep": 9, **settings}
    run(make_config(**common, output_dir=str(tmp_path / "whole")))
    expected = record(tmp_path / "whole")
    more = {"kept_tokens_share", "kept_loss_share"} if "loss.token_share" in settings else set()
    more |= {"dial", "relative_length"} if "teacher.target" in settings else set()
    assert all(set(row) == KEYS | more for row in expected)
    for stop in (1, 2, 3, 4):
        out = tmp_path / f"stopped-{stop}"
        config = make_config(**common, output_dir=str(out))
        run(config, callbacks=[StopAt(stop)])
        assert len(record(out)) == stop
        run(config)
        assert record(out) == expected
        left, right = parameters(out / "model"), parameters(tmp_path / "whole" / "model")
        assert all(torch.equal(left[n], right[n]) for n in right)


def test_the_record_is_cut_to_the_checkpoint(make_config, tmp_path):
    config = make_config(**{"eval.problems": 0, "train.save_every": 2})
    run(config, callbacks=[StopAt(2)])
    out = tmp_path / "run"
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss_nats": 99}) + "\n")
        file.write('{"step": 4, "loss_')
    run(config)
    assert [row["step"] for row in record(out)] == [1, 2, 3, 4, 5]
    assert record(out)[2]["loss_nats"] != 99


def test_a_finished_run_started_again_only_reports(make_config, tmp_path):
    config = make_config()
    _, first = run(config)
    before = record(tmp_path / "run")
    _, second = run(config)
    assert record(tmp_path / "run") == before
    assert second["trained"] == first["trained"]


def test_resume_none_does_not_overwrite_a_run(make_config):
    run(make_config(**{"eval.problems": 0, "train.steps": 1}))
    with pytest.raises(ConfigError, match="would overwrite"):
        run(make_config(**{"train.resume": "none"}))


def test_layouts_and_micro_batches_train_alike(make_config, tmp_path):
    losses = []
    for i, changes in enumerate(
        [
            {"train.packing": "off"},
            {"train.packing": "on"},
            {"train.max_tokens_per_micro_batch": 1},
            {"loss.backend": "reference"},
        ]
    ):
        out = tmp_path / str(i)
        run(make_config(**{"eval.problems": 0, "train.steps": 2, **changes}, output_dir=str(out)))
        losses.append([row["loss_nats"] for row in record(out)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("lr", "learns"), [(6e-3, True), (0.0, False)])
def test_the_divergence_falls_and_only_by_training(make_config, tmp_path, lr, learns):
    changes = {"eval.problems": 0, "teacher.mode": "frozen", "train.steps": 40, "optim.lr": lr}
    run(make_config(**changes, **{"train.save_every": 0}))
    losses = [row["loss_nats"] for row in record(tmp_path / "run")]
    assert (sum(losses[-5:]) < 0.75 * sum(losses[:5])) == learns


LONG = {
    "eval.problems": 0,
    "teacher.mode": "frozen",
    "train.steps": 200,
    "train.save_every": 0,
    "optim.lr": 3e-3,
    "optim.schedule": "linear",
    "log.every": 50,
}


def fall(make_config, tmp_path, seed):
    """Share by which the divergence falls in 200 steps: last 10 against the first 5."""
    trainer = OPSDCTrainer(
        tiny_model(seed=seed, initializer_range=0.15),
        make_config(**LONG, seed=seed),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    losses = [row["loss_nats"] for row in record(tmp_path / "run")]
    fell = 1 - (sum(losses[-10:]) / 10) / (sum(losses[:5]) / 5)
    print(f"seed {seed}: {losses[0]:.4f} to {losses[-1]:.4f} nats per token, {fell:.1%}")
    return fell


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_falls_by_nine_tenths_in_200_steps(make_config, tmp_path, seed):
    assert fall(make_config, tmp_path, seed) >= 0.9


@pytest.mark.slow
def test_without_the_gradient_of_the_loss_it_does_not(make_config, tmp_path, monkeypatch):
    """The divergence is still measured, but what is differentiated is zero."""
    from opsdc.method import update

    real = update.distillation_loss

    def zeroed(*arguments, **keywords):
        loss, stats = real(*arguments, **keywords)
        # The value without its gradient, and a gradient of zeros.
        return loss.detach() + 0 * loss, stats

    monkeypatch.setattr(update, "distillation_loss", zeroed)
    assert fall(make_config, tmp_path, 0) < 0.5


def test_rows_and_a_module_from_python(make_config, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(12)]
    trainer = OPSDCTrainer(
        tiny_model("qwen3"),
        make_config(**{"train.steps": 1, "data.source": "unused"}),
        train_dataset=rows[:8],
        eval_dataset=rows[8:],
        processing_class=byte_tokenizer(),
    )
    assert trainer.train()["base"]["answers"] == 4
    with pytest.raises(ConfigError, match="processing_class"):
        OPSDCTrainer(tiny_model(), make_config())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", ["qwen3-8b", "qwen3-14b", "qwen3-8b-lora"])
def test_qwen3_recipes_train_a_random_twin(recipe, tied, problem_file, tmp_path):
    """The recipe as it is, but for sizes: same architecture, two layers, short responses."""
    folder = tmp_path / "twin"
    tiny_model("qwen3", tied=tied).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = OPSDCConfig.load(
        recipe,
        {
            "output_dir": str(tmp_path / "run"),
            "model.name_or_path": str(folder),
            "data.source": str(problem_file),
            "data.options": "{prompt_template: DAPO}",
            "data.prompt_column": "problem",
            "data.answer_column": "answer",
            "data.eval_size": "3",
            "rollout.prompts_per_step": "2",
            "rollout.max_new_tokens": "8",
            "teacher.refresh_steps": "1",
            "train.steps": "2",
            "eval.max_new_tokens": "4",
            "eval.samples": "1",
            "eval.every": "0",
            "rollout.engine": "hf",
            "rollout.server_address": "null",
        },
    )
    run(config)
    rows = record(tmp_path / "run")
    assert [row["teacher_version"] for row in rows] == [1, 2]
    assert all(row["loss_nats"] > 0 and row["skipped_steps"] == 0 for row in rows)
    if recipe.endswith("lora"):
        assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "run" / "checkpoints" / "step-000002" / "adapter").is_dir()


def test_a_forward_in_16_bits_trains_from_float32_samples(make_config, tmp_path, capsys):
    """Preflight included: the sampler is the trainer to rounding, the same prompt gives 0."""
    trainer, _ = run(
        make_config(**{"model.dtype": "bfloat16", "train.steps": 2, "log.verbose": True})
    )
    out = capsys.readouterr().out
    line = next(x for x in out.splitlines() if x.startswith("sampler: the trainer's log p"))
    # Rounding, and none of the infinities or zeros of a check that compares nothing.
    assert 1e-4 < float(line.split()[-2]) < 0.5
    assert "same prompt on both sides: 0.0e+00" in out
    assert all(row["loss_nats"] > 0 for row in record(tmp_path / "run"))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_resume_names_what_it_runs_on_now(make_config, monkeypatch, capsys):
    config = make_config(**{"eval.problems": 0, "train.steps": 2})
    real = checkpoint.versions
    monkeypatch.setattr(checkpoint, "versions", lambda: real() | {"torch": "1.0", "threads": 96})
    run(config, callbacks=[StopAt(1)])
    monkeypatch.undo()
    run(config)
    told = [x for x in capsys.readouterr().err.splitlines() if "changed since" in x]
    assert told == [
        f"  changed since that checkpoint: torch: '1.0' → {torch.__version__!r}",
        f"  changed since that checkpoint: threads: 96 → {torch.get_num_threads()}",
    ]


def test_lora_resumes_bit_for_bit(make_config, tmp_path):
    common = {"eval.problems": 0, "model.lora": {"r": 2, "alpha": 4}, "optim.lr": 1e-2}
    run(make_config(**common, output_dir=str(tmp_path / "whole")))
    config = make_config(**common)
    run(config, callbacks=[StopAt(3)])
    run(config)
    assert record(tmp_path / "run") == record(tmp_path / "whole")


def test_prompts_above_the_limit_are_dropped_and_counted(make_config, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    rows = [{"problem": "x" * (400 if i % 4 == 0 else 4) + str(i)} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = OPSDCTrainer(
        None, make_config(**{"data.source": str(path), "prompt.max_tokens": 200})
    )
    assert "longer than prompt.max_tokens 200" in capsys.readouterr().err
    assert len(trainer.problems) + len(trainer.held_out) == 18
    with pytest.raises(DataError, match="raise it to at least"):
        OPSDCTrainer(None, make_config(**{"data.source": str(path), "prompt.max_tokens": 10}))


def test_too_few_problems_for_a_step(make_config):
    with pytest.raises(DataError, match=r"rollout\.prompts_per_step"):
        OPSDCTrainer(None, make_config(**{"rollout.prompts_per_step": 40}))


@pytest.mark.parametrize("place", ["rollout", "hidden states", "gradient"])
def test_one_sick_step_leaves_parameters_and_moments_untouched(make_config, monkeypatch, place):
    """NaN once, in step 2: the bits before and after it are the same, and the run goes on."""
    from opsdc import train
    from opsdc.method import update

    states, calls = [], [0]
    real_update, real_hidden = train.update, update.hidden_states

    def bits(model, optimizer):
        moments = (
            v.clone() for p in model.parameters() for v in optimizer.state.get(p, {}).values()
        )
        return [p.detach().clone() for p in model.parameters()], list(moments)

    def watched(model, teacher, pairs, optimizer, *rest, **keywords):
        calls[0] += 1
        before = bits(model, optimizer)
        result = real_update(model, teacher, pairs, optimizer, *rest, **keywords)
        states.append((result.skipped, before, bits(model, optimizer)))
        return result

    monkeypatch.setattr(train, "update", watched)
    trainer = OPSDCTrainer(None, make_config(**{"eval.problems": 0, "train.steps": 4}))
    if place == "hidden states":
        monkeypatch.setattr(
            update,
            "hidden_states",
            lambda m, b: real_hidden(m, b) * (math.nan if calls[0] == 2 else 1.0),
        )
    elif place == "gradient":
        weight = trainer.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda grad: grad * (math.nan if calls[0] == 2 else 1.0))
    else:
        # The sampler's own logits: whatever it makes of them, the step must not poison the model.
        head = trainer.model.lm_head
        sick = lambda m, i, z: z * math.nan if calls[0] == 1 and not m.training else z  # noqa: E731
        head.register_forward_hook(sick)
    trainer.train()
    skipped = [s for s, _, _ in states]
    assert skipped == [False, True, False, False]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    _, before, after = states[1]
    assert all(torch.equal(a, b) for a, b in zip(before[0] + before[1], after[0] + after[1]))


def test_three_sick_steps_in_a_row_stop_the_run(make_config, tmp_path):
    trainer = OPSDCTrainer(None, make_config(**{"eval.problems": 0}))
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    rows = record(tmp_path / "run")
    # The third is not taken: its state before and its batch are what is left.
    assert [row["skipped_steps"] for row in rows] == [1, 2]
    assert rows[0]["grad_norm"] is None


def test_a_response_that_is_only_the_end_token_is_trained(make_config, tmp_path):
    """A model that ends at once: one scored position per response, nothing empty."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 50.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    trainer = OPSDCTrainer(
        model,
        make_config(**{"eval.problems": 0, "train.steps": 1}),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    (row,) = record(tmp_path / "run")
    assert row["response_tokens_mean"] == 1
    assert (row["truncated_share"], row["empty_share"]) == (0, 0)
    assert row["loss_nats"] is not None


def test_only_the_first_tokens_of_a_response_are_trained_on(make_config, tmp_path, monkeypatch):
    trained = []
    update = train.update

    def watched(model, teacher, pairs, *arguments, **keywords):
        result = update(model, teacher, pairs, *arguments, **keywords)
        trained.append(([list(p.response_ids) for p in pairs], len(result.divergence)))
        return result

    monkeypatch.setattr(train, "update", watched)
    config = make_config(
        **{"train.steps": 1, "train.max_train_tokens": 5, "eval.problems": 0, "optim.lr": 0}
    )
    run(config)
    sampled = [row["response_ids"] for row in read_lines(tmp_path / "run" / "rollouts.jsonl")]
    assert max(map(len, sampled)) > 5
    assert trained == [([ids[:5] for ids in sampled], sum(min(len(ids), 5) for ids in sampled))]
    cut = sum(max(len(ids) - 5, 0) for ids in sampled)
    assert record(tmp_path / "run")[0]["cut_share"] == cut / sum(map(len, sampled))


def right_where(monkeypatch, rule):
    """Let responses be right by a rule on their number within the step."""
    from opsdc.eval import answers
    from opsdc.eval.scorers import Score

    asked = [0]

    def score(text, problem, scorer):
        asked[0] += 1
        return Score(rule(asked[0] - 1), text)

    monkeypatch.setattr(answers, "score", score)


NO_EVAL = {"eval.problems": 0, "rollout.max_new_tokens": 40, "data.scorer": "number"}


def test_only_right_answers_are_learned_from(make_config, tmp_path, monkeypatch):
    """Wrong and truncated ones have no part in the mean: the step equals one without them."""
    trained = []
    real = train.update

    def watched(model, teacher, pairs, *arguments, **keywords):
        trained.append([list(p.response_ids) for p in pairs])
        return real(model, teacher, pairs, *arguments, **keywords)

    monkeypatch.setattr(train, "update", watched)
    right_where(monkeypatch, lambda i: i % 2 == 0)
    settings = {**NO_EVAL, "data.train_on": "correct", "train.steps": 2, "rollout.batch_size": 4}
    run(make_config(**settings))
    rows = read_lines(tmp_path / "run" / "rollouts.jsonl")
    for step, (row, ids) in enumerate(zip(record(tmp_path / "run"), trained), 1):
        sampled = [r for r in rows if r["step"] == step]
        assert [r["response_ids"] for r in sampled if r["right"]] == ids
        assert row["right_share"] == len(ids) / 4
        assert all(r["finished"] for r in sampled if r["right"])


def test_wrong_answers_pull_back_to_the_plain_teacher(make_config, tmp_path, monkeypatch):
    dials = []
    real = train.update

    def watched(model, teacher, pairs, *arguments, **keywords):
        dials.append([p.dial for p in pairs])
        return real(model, teacher, pairs, *arguments, **keywords)

    monkeypatch.setattr(train, "update", watched)
    right_where(monkeypatch, lambda i: False)
    settings = {**NO_EVAL, "data.train_on": "dial", "train.steps": 2, "optim.weight_decay": 0}
    trainer, _ = run(make_config(**settings))
    assert dials == [[0.0] * 4] * 2
    # The plain teacher still is the student, so there is nothing to learn.
    assert [row["loss_nats"] for row in record(tmp_path / "run")] == [0.0, 0.0]
    start = tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), start.parameters()))


def test_steps_without_a_right_answer_are_recorded_and_change_nothing(make_config, tmp_path):
    """Five in a row: nothing is wrong with them, so the run does not give up."""
    settings = {**NO_EVAL, "data.train_on": "correct"}
    trainer, summary = run(make_config(**settings))
    assert summary["steps"] == 5
    for row in record(tmp_path / "run"):
        assert (row["right_share"], row["loss_nats"], row["skipped_steps"]) == (0.0, None, 0)
    start = tiny_model()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), start.parameters()))


@pytest.mark.parametrize("train_on", ["correct", "dial"])
def test_right_answers_need_answers(make_config, tmp_path, train_on):
    rows = [{"problem": f"What is {i}?"} for i in range(30)]
    config = make_config(**{**NO_EVAL, "data.train_on": train_on})
    with pytest.raises(ConfigError, match=r"data.train_on .* data\.answer_column"):
        OPSDCTrainer(None, config, rows)


def test_an_unknown_scorer_is_refused_before_anything_is_sampled(make_config):
    for settings in ({"eval.scorer": "vibes"}, {"data.scorer": "vibes", "data.train_on": "dial"}):
        with pytest.raises(ConfigError, match="scorer 'vibes'"):
            OPSDCTrainer(None, make_config(**settings))


def test_a_target_is_measured_and_recorded(make_config, tmp_path):
    config = make_config(
        **{"eval.problems": 0, "teacher.target": 0.5, "rollout.max_new_tokens": 30}
    )
    trainer, _ = run(config)
    rows = record(tmp_path / "run")
    assert rows[0]["dial"] == 1.0
    assert len({row["dial"] for row in rows}) > 1
    assert all(0 < row["relative_length"] < 3 for row in rows)
    assert trainer.dial.value != rows[-1]["dial"]


@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_divergence_of_single_tokens_is_recorded_in_their_order(make_config, tmp_path, packing):
    settings = {"eval.problems": 0, "train.steps": 3, "rollout.prompts_per_step": 6}
    # Short rows, so that a step is several micro-batches, whose order is not the responses'.
    small = {"train.max_tokens_per_micro_batch": 120, "train.packing": packing}
    trainer = OPSDCTrainer(None, make_config(**settings, **small))
    updates = []
    commit = trainer.commit
    trainer.commit = lambda step, rollouts, result, perf: (
        updates.append((rollouts, result)),
        commit(step, rollouts, result, perf),
    )
    trainer.train()
    rows = read_lines(tmp_path / "run" / "divergence.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [3] * 4
    sampled = read_lines(tmp_path / "run" / "rollouts.jsonl")
    for row in rows:
        (response,) = [r for r in sampled if r["key"] == row["key"]]
        assert "".join(text for text, _ in row["tokens"]) == response["text"]
        assert len(row["tokens"]) == len(response["response_ids"])
    rollouts, result = updates[0]
    assert len(result.owner) == len(result.divergence)
    assert result.owner.tolist() != sorted(result.owner.tolist())
    # One response at a time, by the weights of step 1's teacher and student: the base's.
    fresh = OPSDCTrainer(None, make_config(**settings))
    layout = padded_layout(fresh.model, fresh.config, fresh.tokenizer)
    fresh.model.eval()
    for pair, row in zip(rollouts.pairs(fresh.config, 1.0), rows[:4]):
        alone = per_token(fresh.model, fresh.teacher, pair, fresh.config, layout)["kl"]
        assert [nats for _, nats in row["tokens"]] == pytest.approx(alone.tolist(), abs=2e-4)
        assert alone.max() > 1e-3
