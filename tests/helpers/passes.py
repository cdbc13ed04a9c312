"""Teacher pass and student pass over some responses, without an optimizer step."""

from opsdc.method.batch import plan_step
from opsdc.method.update import student_pass, teacher_pass


def both_passes(model, teacher, pairs, layout, config):
    """(loss, loss of all tokens, statistics); gradients are in the model's parameters."""
    plan = plan_step(
        pairs, layout, normalization=config.loss.normalization, contexts=teacher.contexts
    )
    hidden = teacher_pass(model, teacher, plan)
    return student_pass(model, teacher, plan, hidden, config)[:3]
