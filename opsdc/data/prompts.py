r"""The two prompts of a problem: the student's, and the teacher's with the instruction in front.

Both go through the model's chat template and end in the same generation suffix, so that every
response token has the same left neighbours on both sides.

    student   the problem's messages
    teacher   placement "user":    "{instruction}\n\n{problem}" in the first user turn
              placement "system":  the instruction in front of the system message, or as a new one
              a problem with `teacher_messages` of its own (a `teacher_prompt` column): those

The paper's layout (arXiv 2603.05433) is recognised by its first sentence: in a DAPO-Math-17k prompt
"Solve the following math problem step by step. The last line ... Remember to put your answer ..."
that sentence gives way to the instruction (placement "user"), the format line and the reminder
stay, once each. The authors' code leaves the reminder in twice; for the same bytes give such
prompts in a `teacher_prompt` column. Plain questions get this layout, with or without the reminder,
from `data.options.prompt_template` (see `opsdc.data.sources`).

A problem's text is data. Nothing formats it, the template never parses it, and a control token
spelled out in it ("<|im_end|>") becomes ordinary tokens: see `_encode`.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsdc.data.text import DAPO_OPENING, text_fault
from opsdc.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsdc.data.problem import Problem

Messages = Sequence[dict[str, str]]
"""A chat: its turns, each with "role" and "content"."""


@dataclass(frozen=True)
class PromptPair:
    """The prompts of student and teacher, as token ids and as the text they stand for."""

    student_ids: list[int]
    teacher_ids: list[int]
    student_text: str
    teacher_text: str
    against_ids: list[int]
    """The prompt with the instruction whose style is subtracted; empty where there is none."""


def load_instruction(spec: str, setting: str = "prompt.instruction") -> str:
    """Return the text of "P1" or "P2" (the paper's two instructions), of a file, or `spec` itself.

    Raises ConfigError for an empty text, a single word that names no file (P3, a mistyped path),
    or a file that is not UTF-8 text.
    """
    if spec in ("P1", "P2"):
        text = (resources.files("opsdc") / "instructions" / f"{spec}.txt").read_text("utf-8")
    elif _is_file(spec):
        try:
            text = Path(spec).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{setting}: cannot read {spec}: {error}") from error
    elif re.fullmatch("[!-~]+", spec):
        raise ConfigError(
            f"{setting} '{spec}' is neither P1, P2 nor a file that exists, and one word "
            "is no instruction; give one of the three, or a sentence"
        )
    else:
        text = spec
    text = text.strip()
    if not text:
        raise ConfigError(
            f"{setting} {spec!r} is empty; give P1, P2, a text file or the text itself"
        )
    if fault := text_fault(text):
        raise ConfigError(f"{setting} holds {fault}; remove it")
    return text


def instructed(text: str, instruction: str) -> str:
    """Return a user turn with the instruction in front, in the place of DAPO's opening sentence."""
    return f"{instruction}\n\n{text.removeprefix(DAPO_OPENING)}"


def build_prompts(
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: str,
    against: str | None = None,
    placement: str = "user",
    enable_thinking: bool | None = None,
    date: str | None = None,
) -> PromptPair:
    """Make the prompts of a problem, each ending where the response begins.

    Args:
        instruction: The text itself, as from `load_instruction`.
        against: Another one, for a third prompt.
        placement: "user" or "system"; without effect on a problem that has `teacher_messages`.
        enable_thinking: Passed to the chat template on both sides, unless it is None.
        date: The day that a chat template prints, as 2026-01-31; None: today.

    For text without control tokens the ids are those of `tokenizer.apply_chat_template`.

    Raises ConfigError (placement), ModelError (no chat template), DataError (a template that
    refuses the messages, prompts that end differently, text that cannot be made harmless).
    """
    if placement not in ("user", "system"):
        raise ConfigError(f"prompt.placement must be user or system, not {placement!r}")
    for messages in (problem.messages, problem.teacher_messages):
        if messages is not None and (not messages or messages[-1]["role"] != "user"):
            raise DataError(f"problem {problem.id}: the last message must be a user turn")
    teacher_messages = problem.teacher_messages
    if teacher_messages is None:
        teacher_messages = _teacher_messages(problem.messages, instruction, placement)
    options: dict[str, Any] = {}
    if enable_thinking is not None:
        options["enable_thinking"] = enable_thinking
    template = _chat_template(tokenizer)
    if date is not None and "strftime_now" in template:
        options["chat_template"] = _on(date) + template
    sides = {"student": problem.messages, "teacher": teacher_messages}
    if against is not None:
        sides["against"] = _teacher_messages(problem.messages, against, placement)
    ids, texts, suffixes = [], [], {}
    control = _control_tokens(tokenizer)
    for side, messages in sides.items():
        where = f"problem {problem.id}, {side} prompt"
        pieces, suffix = _render(messages, tokenizer, control, options, where)
        ids.append(_encode(pieces, tokenizer, control, where))
        texts.append("".join(pieces))
        suffixes[side] = suffix
    for side, suffix in suffixes.items():
        if suffix != suffixes["student"]:
            raise DataError(
                f"problem {problem.id}: after the last user turn the student's prompt ends in "
                f"{suffixes['student']!r} and the {side}'s in {suffix!r}, so response tokens would "
                "not be compared like with like; the chat template reacts to something in the "
                "instruction or the messages: try the other prompt.placement, set "
                "prompt.enable_thinking, or reword prompt.instruction"
            )
    return PromptPair(ids[0], ids[1], texts[0], texts[1], ids[2] if len(ids) > 2 else [])


def _teacher_messages(
    messages: tuple[dict[str, str], ...], instruction: str, placement: str
) -> tuple[dict[str, str], ...]:
    """Return the student's chat with the instruction placed in it."""
    if placement == "system":
        first, rest = messages[0], messages[1:]
        if first["role"] != "system":
            return ({"role": "system", "content": instruction}, *messages)
        return ({**first, "content": f"{instruction}\n\n{first['content']}"}, *rest)
    at = next(i for i, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[at], "content": instructed(messages[at]["content"], instruction)}
    return (*messages[:at], turn, *messages[at + 1 :])


def _render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    control: dict[int, str],
    options: dict[str, Any],
    where: str,
) -> tuple[list[str], str]:
    """Return the prompt's text in pieces, and the suffix behind its last user turn.

    The pieces are cut inside every control token that a message spells out. Two characters that
    nothing else here uses go through the template as any letter does: `cut` stands where to cut,
    `end` where the last message ends.
    """
    for message in messages:
        if fault := text_fault(message["content"]):
            raise DataError(f"{where} holds {fault}; remove it from the data")
    pattern = _any_of(tuple(control.values()))
    used = set(_chat_template(tokenizer)).union(*(message["content"] for message in messages))
    free = (chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in used)
    cut, end = next(free), next(free)
    prepared = [
        {"role": message["role"], "content": _cut(message["content"], pattern, cut)}
        for message in messages
    ]
    # The end is marked before trailing blanks, because templates may strip those.
    content = prepared[-1]["content"]
    body = content.rstrip()
    trailing = content[len(body) :]
    prepared[-1]["content"] = body + end + trailing
    try:
        rendered = tokenizer.apply_chat_template(
            prepared, tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # Templates raise what they like, mostly jinja2's TemplateError.
        raise DataError(
            f"{where}: the model's chat template refuses the messages "
            f"({[message['role'] for message in messages]}): {error}; a template without system "
            "turns needs prompt.placement user"
        ) from error
    assert isinstance(rendered, str)
    expected = sum(message["content"].count(cut) for message in prepared)
    if rendered.count(end) != 1 or rendered.count(cut) != expected:
        raise DataError(
            f"{where}: the model's chat template does not print each message exactly once, so the "
            "prompt's text cannot be told from its markup; use another template"
        )
    suffix = rendered[rendered.index(end) + 1 :].removeprefix(trailing)
    return rendered.replace(end, "").split(cut), suffix


def _cut(text: str, control: re.Pattern[str], mark: str) -> str:
    """Put `mark` inside every occurrence of a control token, overlapping ones included."""
    cuts: list[int] = []
    for spelling in control.finditer(text):
        start, stop = spelling.span(1)
        if not (cuts and start < cuts[-1] < stop):
            cuts.append(start + 1)
    edges = [0, *cuts, len(text)]
    return mark.join(text[a:b] for a, b in pairwise(edges))


def _encode(
    pieces: list[str],
    tokenizer: PreTrainedTokenizerBase,
    control: dict[int, str],
    where: str,
) -> list[int]:
    """Encode pieces so that control tokens come from the chat template alone.

    A tokenizer looks for control tokens before anything else, so each of them splits the text.
    Text cut inside a control token that a message spells out therefore cannot form it, and the
    pieces are encoded as the ordinary text they are. Without such a spelling there is one piece:
    exactly what `apply_chat_template` encodes. Control tokens are counted in the result, because a
    tokenizer may look for them after it has changed the text: ＜|im_end|＞ under NFKC.
    """
    ids: list[int] = []
    for encoded in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
        ids += encoded
    if len(pieces) > 1:
        # Some tokenizers (sentencepiece) put a space before every piece.
        whole = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
        if _decode(ids, tokenizer) != _decode(whole, tokenizer):
            raise DataError(
                f"{where} spells out a control token of the model, and this tokenizer cannot "
                "encode that as ordinary text; remove it from the data"
            )
    pattern = _any_of(tuple(control.values()))
    written = Counter(name for piece in pieces for name in pattern.findall(piece))
    for token, count in Counter(filter(control.__contains__, ids)).items():
        if count > written[control[token]]:
            raise DataError(
                f"{where} holds text that the tokenizer's normalizer turns into the control token "
                f"{control[token]}; remove it from the data"
            )
    return ids


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _on(date: str) -> str:
    """Return what makes a chat template print this day: its own `strftime_now`, a Jinja macro.

    It stands before transformers' function of this name, which reads the clock.
    """
    day = datetime.datetime.fromisoformat(date)
    # "%%" last: what it leaves is no directive.
    directives = [f"%{x}" for x in ("-d", "-m", *"aAbBcdeHIjmMpSuUwWxXyYfzZ")]
    values = [(x, day.strftime(x)) for x in directives] + [("%%", "%")]
    replaced = "".join(f" | replace({x!r}, {value!r})" for x, value in values)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}"


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template; use "
            "an instruct model, or set tokenizer.chat_template"
        ) from error


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the control tokens by id, longest first: special ones, and those the template writes.

    Some models' turn markers are added tokens without the special flag. Added tokens that are
    neither (runs of blanks, HTML tags) are text and stay what they are.
    """
    template = _chat_template(tokenizer)
    names = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if len(token.content) > 1
        and token.content.strip()
        and (token.special or token.content in template)
    }
    return dict(sorted(names.items(), key=lambda item: len(item[1]), reverse=True))


@lru_cache(maxsize=8)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    # A look-ahead takes no characters, so overlapping spellings match too.
    return re.compile(f"(?=({'|'.join(map(re.escape, names))}))" if names else "(?!)")


def _is_file(spec: str) -> bool:
    try:
        return Path(spec).is_file()
    except (OSError, ValueError):  # Too long or with a NUL: a text, not a path.
        return False
