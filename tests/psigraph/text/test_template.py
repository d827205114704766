"""Chat templates: what they write, what they are refused, and that none of them keeps the program busy."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import Q4, changed

from psigraph.ir.errors import ModelFileError, OutputError, PsigraphError, UnsupportedModelError, UsageError
from psigraph.runtime.gguf.file import open_gguf
from psigraph.text import template as module
from psigraph.text import template_jail
from psigraph.text.template import KEY, ChatTemplate, _folders, given_template, read_template

HELLO = [{"role": "user", "content": "Hello"}]
MOST_CPU_SECONDS = 3.5  # of the process, its start too; how long that is by the clock, the machine's load says
REFERENCE_SCRIPT = Path(__file__).parents[3] / "scripts" / "template_reference.py"


def reference_script() -> Any:
    """scripts/template_reference.py, which recorded what transformers writes."""
    spec = spec_from_file_location("template_reference", REFERENCE_SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


REFERENCE = reference_script()
OWN, RECORDED = REFERENCE.read("own.json"), REFERENCE.read("transformers.json")


@pytest.mark.parametrize("name", OWN)
def test_what_a_template_may_use_writes_what_transformers_writes(name: str) -> None:
    assert REFERENCE.by_psigraph(OWN[name]) == RECORDED["own"][name]


def test_published_templates_were_recorded_in_all_conversations() -> None:
    """The templates are others' and not here; `make templates` compares with them."""
    families = {name.replace("-", ".").split(".")[0] for name in RECORDED["published"]}
    assert len(families) >= 12
    for one in RECORDED["published"].values():
        assert list(one["results"]) == ["system", "tools", "reasoning", "long", "empty"]
    assert RECORDED["own"].keys() == OWN.keys()


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
BIG_OUTPUT = "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"
NESTED: list[Any] = []
for _ in range(70):
    NESTED = [NESTED]
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
    "{{ 'x'.encode('cp437') }}": "unknown encoding",
    "{{ 1 | tojson(compact=true) }}": "unexpected keyword argument 'compact'",
    "{% for %}": "line 1: Expected an expression",
    "{{ messages[0": "line 1: unexpected end",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{{ 1 / 0 }}": "division by zero",
    r"{{ '\udcff' }}": "valid Unicode",
}


@pytest.mark.parametrize(("source", "said"), HOSTILE.items(), ids=lambda value: value[:36])
def test_a_hostile_template_ends_in_one_clear_error(source: str, said: str) -> None:
    began = cpu_seconds_of_children()
    with pytest.raises(ModelFileError) as caught:
        ChatTemplate(source).render(HELLO)
    assert cpu_seconds_of_children() - began < MOST_CPU_SECONDS
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


def test_a_long_conversation_passes_unless_the_context_cannot_hold_it() -> None:
    long = "naïve ☃ " * 100_000
    said = [{"role": "user", "content": long}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(said, most_characters=len(long)) == long
    with pytest.raises(UsageError, match=r"more than 799,999 characters .* --ctx"):
        template.render(said, most_characters=len(long) - 1)
    with pytest.raises(UsageError, match="more than 16,777,216 characters"):
        ChatTemplate(BIG_OUTPUT).render(HELLO)


def test_what_jinja_and_python_import_late_was_imported_before_the_files_were_gone() -> None:
    source = (
        r"{{ '<b>a</b>&amp;' | striptags }}{{ 'a b' | wordwrap(1) }}{{ '\N{BULLET}' }}{{ {'a': 1} | pprint }}"
        r"{{ 'www.a.org' | urlize | length }}{{ [5] | random }}{{ lipsum(n=1) | length > 9 }}"
    )
    assert ChatTemplate(source).render(HELLO) == "a&a\nb•{'a': 1}565True"


def test_the_clock_goes_as_the_users_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "ABC-13:30")
    there = timezone(timedelta(hours=13, minutes=30))
    before = datetime.now(there)
    found = ChatTemplate("{{ strftime_now('%d %H:%M') }}").render(HELLO)
    assert f"{before:%d %H:%M}" <= found <= f"{datetime.now(there):%d %H:%M}"


TEXT_ONLY = "{% for m in messages %}{{ m.role + ': ' + m.content + ';' }}{% endfor %}"
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_a_template_that_knows_no_content_but_text_gets_text() -> None:
    """Transformers shows the list, or the template breaks: there is nothing to agree with."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": CALLS}]
    assert ChatTemplate(TEXT_ONLY).render(talk) == "user: a\nb;assistant: ;"
    assert ChatTemplate("{{ messages[0].content }}").render(talk) == "a\nb"


def test_it_says_what_it_writes_between_turns() -> None:
    assert ChatTemplate(QWEN).turn_end().startswith("<|im_end|>\n<|im_start|>user")
    assert ChatTemplate("{{ raise_exception('no') }}").turn_end() == ""
    template = ChatTemplate("{{ messages | map(attribute='content') | join('<|over|>') }}")
    assert template.render(HELLO) == "Hello"
    assert template.turn_end() == "<|over|>b"  # known from the same process


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "conversation is empty"),
        ([{"role": "user"}], "message 0: give a role and a content"),
        ([{"role": "user", "content": None}], "message 0: give a role and a content"),
        ([{"role": "assistant", "content": None}], "message 0: give a role and a content"),
        ([*HELLO, {"role": "doctor", "content": "x"}], "message 1: role 'doctor'"),
        ([{"role": "user", "content": 3}], "message 0: its content must be text"),
        ([{"role": "user", "content": "\udcff"}], r"message 0: .* not valid Unicode"),
        ([{"role": "user", "content": "a", "name": "\udcff"}], r"message 0: .* not valid Unicode"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "part 0 of its content is of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part 0 of its content holds no text"),
        ([{"role": "user", "content": "a", "when": object()}], "message 0: holds a object"),
        ([{"role": "assistant", "content": "a", "reasoning_content": 5}], "message 0: its reasoning must be text"),
        ([{"role": "assistant", "content": "a", "tool_calls": NESTED}], "message 0: .* 64 deep"),
    ],
)  # fmt: skip
def test_messages_that_are_no_conversation(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ChatTemplate("x").render(messages)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [{"name": "f"}]}, "tools: the model's chat template knows none"),
        ({"variables": {"effort": "high"}}, "--template-var effort: the model's chat template knows no such variable"),
        ({"variables": {"messages": []}}, "--template-var 'messages': is no variable that can be set"),
        ({"thinking": True}, "--thinking on: the model's chat template cannot switch thinking"),
    ],
)
def test_what_the_template_knows_nothing_of_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ChatTemplate("{{ messages[0].content }}").render(HELLO, **options)


def test_thinking_is_switched_once() -> None:
    with pytest.raises(UsageError, match=r"--thinking on: --template-var sets enable_thinking too"):
        ChatTemplate("{{ enable_thinking }}").render(HELLO, True, variables={"enable_thinking": False})


def a_file(**templates: Any) -> Any:
    names = {(KEY if name == "default" else f"{KEY}.{name}"): text for name, text in templates.items()}
    return SimpleNamespace(metadata=names)


def test_a_file_may_have_several_templates() -> None:
    file = a_file(default="plain", tool_use="tools", rag="documents")
    asked = [{"name": "f"}]
    assert ChatTemplate.of_file(file).request(HELLO)["source"] == "plain"
    assert ChatTemplate.of_file(file).request(HELLO, tools=asked)["source"] == "tools"
    assert ChatTemplate.of_file(file, "rag").source == "documents"
    assert ChatTemplate.of_file(file, "{{ mine }}").source == "{{ mine }}"
    with pytest.raises(UsageError, match=r"none: .* \(those of the model: 'default', 'tool_use', 'rag'\)"):
        ChatTemplate.of_file(file, "none")
    with pytest.raises(UnsupportedModelError, match=r"is missing, .* by name: 'tool_use'"):
        ChatTemplate.of_file(a_file(tool_use="tools"))


def test_a_users_template_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"^--chat-template: it cannot be rendered: line 1"):
        ChatTemplate.of_file(a_file(default="x"), "{% for %}").render(HELLO)
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf{{ 1 }}\n\n")
    assert read_template(tmp_path / "t.jinja") == "{{ 1 }}\n\n"
    assert given_template(str(tmp_path / "t.jinja")) == given_template(tmp_path / "t.jinja") == "{{ 1 }}\n\n"
    assert (given_template("rag"), given_template("{{ a/b }}")) == ("rag", "{{ a/b }}")
    for data, said in ((b" \n", "is empty"), (b"\xff{{", "byte 0 is not UTF-8"), (None, "cannot be read")):
        path = tmp_path / "wrong.jinja"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UsageError, match=said):
            read_template(path)


@pytest.mark.parametrize("empty", ["", " \n", 7])
def test_an_empty_template_is_told_as_absent(empty: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.chat_template is empty, so nobody can say"):
        ChatTemplate.of_file(a_file(default=empty))


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
    monkeypatch.setattr(module.sys, "executable", "/nonexistent/python")
    with pytest.raises(PsigraphError, match="cannot start"):
        ChatTemplate("ok").render(HELLO)


def test_a_busy_machine_is_waited_for_and_no_file_is_blamed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass at every look at the clock: more than rendering may take, less than patience."""
    monkeypatch.setattr(module.time, "monotonic", itertools.count(0, 10).__next__)
    assert ChatTemplate("ok").render(HELLO) == "ok"
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 5.0)
    with pytest.raises(OutputError, match=r"gave no answer in 5 s: .* too busy; try again"):
        ChatTemplate("ok").render(HELLO)


ATTEMPTS = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
import template_jail
print(template_jail.limit(5, 64 << 20))
for attempt in (
    lambda: open("/etc/passwd"), lambda: os.dup(1), lambda: os.stat("/"), lambda: os.listdir("/"),
    lambda: os.unlink("/nothing"), socket.socket, os.fork, lambda: os.execv("/bin/true", ["true"]),
    lambda: os.kill(os.getppid(), 0), lambda: bytearray(1 << 30),
):
    try:
        print("done", attempt())
    except BaseException as error:
        print(type(error).__name__, getattr(error, "errno", None))
"""


def test_the_process_has_no_file_no_network_and_no_children() -> None:
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ATTEMPTS, str(Path(template_jail.__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    filtered, *attempts = found.stdout.splitlines()
    known = os.uname().machine in ("x86_64", "aarch64") and Path("/proc/sys/kernel/seccomp/actions_avail").exists()
    assert filtered == str(known)
    if known:  # the kernel filters system calls
        assert attempts == ["PermissionError 1"] * 9 + ["MemoryError None"]
    else:  # no descriptor all the same
        assert attempts[:2] == ["OSError 24", "OSError 24"]
        assert attempts[-1] == "MemoryError None"


def test_a_variable_is_a_word_of_the_template_and_no_part_of_one() -> None:
    template = ChatTemplate("{{ effort }}{% for m in messages %}{{ m.role }}{% endfor %}")
    assert template.request(HELLO, variables={"effort": 1})
    for name in ("role", "ort", "f"):
        with pytest.raises(UsageError, match="knows no such variable"):
            template.request(HELLO, variables={name: 1})
