import pytest
import torch
from helpers.tiny import tiny_model

from opsdc.config.settings import TeacherConfig
from opsdc.method.teacher import Teacher
from opsdc.models.head import read_head


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def move(model, amount=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)


def weights_of(teacher, model):
    with teacher.weights():
        return snapshot(model)


def test_scoring_uses_the_copy_and_puts_the_student_back():
    model = tiny_model()
    start, teacher = snapshot(model), Teacher(model, TeacherConfig(mode="frozen"))
    move(model)
    moved = snapshot(model)
    assert equal(weights_of(teacher, model), start)
    assert equal(snapshot(model), moved)


def test_the_student_is_back_after_an_error():
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    move(model)
    moved = snapshot(model)
    with pytest.raises(RuntimeError), teacher.weights():
        raise RuntimeError
    assert equal(snapshot(model), moved)


def test_refresh_copies_after_every_mth_update_and_at_no_other_time():
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="refresh", refresh_steps=3))
    seen = {0: snapshot(model)}
    for step in range(1, 8):
        move(model)
        seen[step] = snapshot(model)
        assert teacher.after_update(step) == (step in (3, 6))
        last = step - step % 3
        assert teacher.version == last
        assert equal(weights_of(teacher, model), seen[last])


def test_frozen_never_changes_and_ema_follows_its_formula():
    for mode in ("frozen", "ema"):
        model = tiny_model()
        expected = snapshot(model)
        teacher = Teacher(model, TeacherConfig(mode=mode, ema_decay=0.9))
        for step in range(1, 4):
            move(model)
            teacher.after_update(step)
            if mode == "ema":
                now = snapshot(model)
                expected = {n: 0.9 * expected[n] + 0.1 * now[n] for n in now}
        found = weights_of(teacher, model)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_live_is_the_student_itself():
    model = tiny_model()
    teacher = Teacher(model, TeacherConfig(mode="live"))
    move(model)
    assert teacher.is_student
    assert equal(weights_of(teacher, model), snapshot(model))
    assert teacher.head().weight is read_head(model).weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_teacher_has_its_own_head_where_the_head_is_trained(tied):
    model = tiny_model(tied=tied)
    start = read_head(model).weight.detach().clone()
    teacher = Teacher(model, TeacherConfig(mode="frozen"))
    move(model)
    assert torch.equal(teacher.head().weight, start)
    assert not torch.equal(read_head(model).weight, start)


def test_lora_copies_the_adapter_alone():
    peft = pytest.importorskip("peft")
    base = tiny_model("qwen3")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    teacher = Teacher(model, TeacherConfig(mode="refresh", refresh_steps=1))
    copied = sum(c.numel() for c in teacher._copies)
    assert copied == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert teacher.head().weight is read_head(model).weight


def test_refresh_on_a_plateau_of_the_loss():
    from opsdc.config.settings import TeacherConfig as Config

    model = tiny_model()
    config = Config(refresh_steps=3, refresh_plateau=0.05)
    teacher = Teacher(model, config)
    # Falls for six steps, is flat for six: the means of 3 and 3 are alike first at step 10.
    losses = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    refreshed = [s for s in range(1, 17) if teacher.after_update(s, losses[:s])]
    # The window starts anew behind a refresh.
    assert refreshed == [12]
    teacher = Teacher(model, config)
    with_holes = [None if i % 4 == 3 else 1.0 for i in range(16)]
    refreshed = [s for s in range(1, 17) if teacher.after_update(s, with_holes[:s])]
    assert refreshed == [7, 15]


@pytest.mark.parametrize("mode", ["refresh", "ema"])
def test_a_paged_teacher_computes_the_same_bits(mode):
    """Kept in host memory, and swapped in by value: the student's own memory stays where it is."""
    found = []
    for offload in (False, True):
        model = tiny_model(tied=False)
        teacher = Teacher(model, TeacherConfig(mode=mode, refresh_steps=2, offload=offload))
        places = [p.data_ptr() for p in model.parameters()]
        seen = []
        for step in range(1, 5):
            move(model)
            student = snapshot(model)
            seen.append(weights_of(teacher, model))
            seen.append({"head": teacher.head().weight.clone()})
            assert equal(snapshot(model), student)
            teacher.after_update(step)
        if offload:
            assert [p.data_ptr() for p in model.parameters()] == places
            assert all(c.device.type == "cpu" for c in teacher._copies)
        found.append(seen)
    assert all(equal(a, b) for a, b in zip(*found))


def test_a_refresh_with_lora_changes_exactly_the_snapshot():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_model("qwen3"), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    teacher = Teacher(model, TeacherConfig(mode="refresh", refresh_steps=1))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    student, before = snapshot(model), weights_of(teacher, model)
    storages = [c.data_ptr() for c in teacher._copies]
    teacher.after_update(1)
    after = weights_of(teacher, model)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert equal(after, student)
    assert equal(snapshot(model), student)
    assert [c.data_ptr() for c in teacher._copies] == storages
    assert sum(c.nbytes for c in teacher._copies) == sum(
        p.nbytes for n, p in model.named_parameters() if "lora_" in n
    )
