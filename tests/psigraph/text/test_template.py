"""Chat templates: what they write, what they are refused, and that none of them keeps the program busy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tiny_model import Q4, changed

from psigraph.ir.errors import ModelFileError, PsigraphError, UnsupportedModelError, UsageError
from psigraph.runtime.gguf.file import open_gguf
from psigraph.text.template import ChatTemplate, _folders

HELLO = [{"role": "user", "content": "Hello"}]
MOST_SECONDS = 3.0

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
BIG_OUTPUT = "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"
NESTED_CALLS = "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}"

# What a template does -> what is said about it.
HOSTILE = {
    ENDLESS: "more than 2 s",
    "{{ 10 ** (10 ** 8) }}": "more than 2 s",
    "{% for i in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{{ 'a' * 10 ** 9 }}": "256 MiB",
    "{{ '%1000000000d' % 1 }}": "256 MiB",
    "{{ 'x'.center(10 ** 10) }}": "256 MiB",
    "{{ ['aaaa'] * 10 ** 8 }}": "256 MiB",
    "{{ 'x' | batch(10 ** 9, 'y') | list }}": "256 MiB",
    DOUBLING: "256 MiB",
    BIG_OUTPUT: "256 MiB",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "sandbox forbids",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('id') }}": "sandbox forbids",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "sandbox forbids",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}": "sandbox forbids",
    "{{ (messages | attr('__class__')).mro() }}": "sandbox forbids",
    "{% set x = messages.append(1) %}": "sandbox forbids",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "calls itself",
    NESTED_CALLS: "calls itself",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "calls itself",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ lipsum(n=9) }}": "open a file",
    "{% for %}": "line 1: Expected an expression",
    "{{ messages[0": "line 1: unexpected end",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "division by zero",
    r"{{ '\udcff' }}": "valid Unicode",
}


@pytest.mark.parametrize(("source", "said"), HOSTILE.items(), ids=lambda value: value[:36])
def test_a_hostile_template_ends_in_one_clear_error(source: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(ModelFileError) as caught:
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - began < MOST_SECONDS
    message = str(caught.value)
    assert message.startswith("tokenizer.chat_template: ")
    assert said in message
    assert "\n" not in message
    assert len(message) < 300


def test_the_tiny_models_template_writes_its_reference_prompt() -> None:
    with open_gguf(Q4) as file:
        template = ChatTemplate.of_file(file)
    said = [{"role": "user", "content": "The state of the Union is strong."}]
    wanted = "<|im_start|>user\nThe state of the Union is strong.<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(said) == wanted
    assert template.render([{"role": "system", "content": "Be\nbrief ☃ {{ 1 }}"}, *said]) == (
        "<|im_start|>system\nBe\nbrief ☃ {{ 1 }}<|im_end|>\n" + wanted
    )
    with pytest.raises(UsageError, match=r"--thinking off: .* cannot switch"):
        template.render(said, thinking=False)


QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not(message.content.startswith('<tool>')) %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = message.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def test_a_template_as_qwen_writes_them() -> None:
    template = ChatTemplate(QWEN)
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nB"},
        {"role": "user", "content": "C"},
    ]
    plain = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(talk) == template.render(talk, thinking=True) == plain
    assert template.render(talk, thinking=False) == plain + "<think>\n\n</think>\n\n"


def test_helpers_and_tokens_that_templates_expect() -> None:
    source = "{{ bos_token }}{{ strftime_now('%Y') | int > 2000 }} {{ {'a': 'é'} | tojson }}{{ messages | length }}"
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO) == '<s>True {"a": "é"}1'
    assert ChatTemplate("  {% if 1 %}\nx\n{% endif %}\n").render(HELLO) == "x\n"
    with pytest.raises(UsageError, match="refuses this conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate.') }}").render(HELLO)


def test_a_long_conversation_passes() -> None:
    long = "naïve ☃ " * 100_000
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": long}]) == long


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "conversation is empty"),
        ([{"role": "user"}], "message 0: give a role and a content"),
        ([*HELLO, {"role": "doctor", "content": "x"}], "message 1: role 'doctor'"),
        ([{"role": "user", "content": 3}], "message 0: its content must be text"),
        ([{"role": "user", "content": "\udcff"}], r"message 0: .* not valid Unicode"),
    ],
)
def test_messages_that_are_no_conversation(messages: list[dict[str, str]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ChatTemplate("x").render(messages)


def test_a_file_without_a_template(tmp_path: Path) -> None:
    with (
        open_gguf(changed(tmp_path / "m.gguf", b"tokenizer.chat_template", b"tokenizer.chat_templ8te")) as file,
        pytest.raises(UnsupportedModelError, match=r"tokenizer\.chat_template is missing"),
    ):
        ChatTemplate.of_file(file)


def test_the_process_is_gone_and_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    assert ChatTemplate("ok").render(HELLO) == "ok"
    assert all(Path(folder).is_dir() for folder in _folders())
    monkeypatch.setattr("psigraph.text.template.sys.executable", "/nonexistent/python")
    with pytest.raises(PsigraphError, match="cannot start"):
        ChatTemplate("ok").render(HELLO)
