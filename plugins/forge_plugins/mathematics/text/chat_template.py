"""Conversations as one text, by the Jinja template that a tokenizer carries.

A template is code from a stranger: it runs in Jinja's immutable sandbox, and sees plain values.
Settings, filters and functions are those of transformers (`apply_chat_template`), so that a model
is trained on the text that it is asked with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, Final, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
Span = tuple[int, int]
_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""What families call the thoughts before an answer: templates read the first or the second."""


class Rendered(NamedTuple):
    """A conversation as text.

    Args:
        text: of all messages.
        marks: begins and ends of what `{% generation %}` encloses.
    """

    text: str
    marks: list[Span]


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: where a template says that the model wrote it."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.marks: list[Span] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """The enclosed part, as a call that notes where it lies."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.CallBlock(self.call_method("_noted"), [], [], body)
        return call.set_lineno(line)

    def _noted(self, caller: Callable[[], str]) -> str:
        text = caller()
        begin = sum(map(len, self.blocks))
        self.marks.append((begin, begin + len(text)))
        return text


class _Dict:
    """`dict` in a template, without the class's other attributes."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        """As of the class."""
        return dict.fromkeys(*given)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, without attributes that reach into Python."""

    def __init__(*given: Any, **named: Any) -> None:
        self, rest = given[0], given[1:]
        attributes = dict(*rest, **named)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write HTML's characters as escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """A template, compiled.

    Args:
        source: in Jinja's language.
        specials: the tokenizer's own tokens by name (`bos_token`, ...), which templates write.
        day: what `strftime_now` tells; None: now.

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, specials: Mapping[str, str], day: date | None = None) -> None:
        self.source, self._specials = source, dict(specials)
        self.is_marked = _MARKED.search(source) is not None
        self.tells_time = "strftime_now" in source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json

        def strftime_now(form: str) -> str:
            moment = datetime.now() if day is None else datetime(day.year, day.month, day.day)
            return moment.strftime(form)

        environment.globals |= {
            "raise_exception": _raise, "strftime_now": strftime_now,
            "dict": _Dict(), "namespace": _Namespace,
        }  # fmt: skip
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template is broken: {_words(error)}") from error
        extension = environment.extensions[_Generation.identifier]
        assert isinstance(extension, _Generation), "it was given"
        self._generation = extension

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, asks: bool = False
    ) -> Rendered:
        """The text of messages.

        Args:
            messages: each with `role` and what the template reads; None stands for no value.
            tools: JSON Schemas of functions that the model may call.
            asks: end with what an answer begins with.

        Raises:
            ValueError: the template refuses them, or fails.
        """
        generation = self._generation
        generation.blocks, generation.marks = [], []
        told = [_with_reasoning(_without_none(message)) for message in messages]
        try:
            for block in self._template.generate(
                messages=told, tools=tools, documents=None, add_generation_prompt=asks,
                **self._specials,
            ):  # fmt: skip
                generation.blocks.append(block)
        except Exception as error:
            # a template is a program: it can raise whatever Python does
            raise ValueError(f"the chat template refuses it: {_words(error)}") from error
        return Rendered("".join(generation.blocks), generation.marks)


def _without_none(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    known = [message[name] for name in _REASONING if name in message]
    return {"thinking": known[0], **message, "reasoning_content": known[0]} if known else message


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def answer_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    chosen: Sequence[int],
) -> Rendered:
    """A conversation's text, and where in it the chosen answers lie.

    A template's own marks are taken where it has them. Of another, what an answer adds to the text
    is what lies between the conversation up to it, with what an answer begins with, and the
    conversation up to its end; both have to be beginnings of the whole.

    Args:
        template: of the text.
        messages: of the conversation.
        tools: see `ChatTemplate.render`.
        chosen: places of answers among the messages, ascending.

    Raises:
        ValueError: the template refuses the messages, or does not tell where the answers lie.
    """
    whole = template.render(messages, tools)
    answers = [place for place, item in enumerate(messages) if item["role"] == "assistant"]
    if template.is_marked:
        if list(chosen) == answers:
            return whole
        if len(whole.marks) != len(answers):
            raise ValueError(
                f"the chat template marks {len(whole.marks)} parts of {len(answers)} answers: "
                "which are the last answer's is not known"
            )
        marks = dict(zip(answers, whole.marks, strict=True))
        return Rendered(whole.text, [marks[place] for place in chosen])
    spans = []
    for place in chosen:
        before = template.render(messages[:place], tools, asks=True).text
        last = place == len(messages) - 1
        behind = whole.text if last else template.render(messages[: place + 1], tools).text
        if not (whole.text.startswith(before) and whole.text.startswith(behind)):
            raise ValueError(
                "the chat template writes the beginning of a conversation otherwise than the "
                "whole, so that it does not tell where the answers lie"
            )
        spans.append((len(before), len(behind)))
    return Rendered(whole.text, spans)
