"""The process in which a chat template is rendered; template.py runs it as a script, so it imports nothing of psigraph.

stdin: a JSON object of source, variables, messages, probe (other messages, to see what is written around theirs), and
the limits cpu_seconds, memory_bytes, output_characters.
stdout: a JSON object of text and probed, or of error and kind ("refused": the template itself says no; "broken";
"memory"; "long": it writes more than it may).
The limits are the kernel's, set after the imports and before the template is looked at.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

# What jinja2 and Python import only when a template asks for it: nothing can be read once the limits hold.
LATE_IMPORTS = (
    "html", "html.entities", "jinja2.constants", "jinja2.debug", "pprint", "random", "textwrap", "unicodedata",
    "encodings.ascii", "encodings.latin_1", "encodings.utf_16", "encodings.utf_32", "encodings.unicode_escape",
)  # fmt: skip
# Every filter and method that imports or reads something at its first use, and the clock, which reads the time zone.
WARM_UP = (
    r"{{ 'a\n\N{BULLET}' | tojson }}{{ '<b>&amp;' | striptags }}{{ 'a b' | wordwrap(1) }}{{ 'a' | pprint }}"
    r"{{ 'www.a.org' | urlize }}{{ [1] | random }}{{ '%.1f' | format(1.5) }}{{ strftime_now('%c %Z') }}"
)


class Refused(Exception):
    """The template called raise_exception."""


class TooLong(Exception):
    """The template writes more than it may."""


def main() -> None:
    """Renders one template. argv: the folder of template_jail.py, and those of jinja2 and its one dependency."""
    # `python -S` starts without site-packages, which is faster and runs no code of other packages.
    sys.path.append(sys.argv[1])
    from template_jail import limit  # type: ignore[import-not-found]  # a script finds its neighbour so

    sys.path[-1:] = sys.argv[2:]  # no other neighbour of this file is a module here
    request = json.load(sys.stdin.buffer)
    environment = warm_environment()
    os.close(0)
    limit(request["cpu_seconds"], request["memory_bytes"])
    answer = answer_to(request, environment)
    environment = request = None
    json.dump(answer, sys.stdout)
    sys.stdout.flush()


def warm_environment() -> Any:
    """An environment that has imported all that a template can ask for."""
    for name in LATE_IMPORTS:
        __import__(name)
    environment = make_environment()
    environment.from_string(WARM_UP).render()
    return environment


def answer_to(request: dict[str, Any], environment: Any) -> dict[str, Any]:
    """What goes to stdout for a request."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    try:
        template = environment.from_string(request["source"])
        text = _text(template, request)
        return {"text": text, "probed": _probed(template, request)}
    except Refused as error:
        return {"kind": "refused", "error": str(error)}
    except TooLong:
        return {"kind": "long", "error": ""}
    except MemoryError:
        return {"kind": "memory", "error": ""}
    except SecurityError as error:
        what = f"the sandbox forbids it: {error}"
    except RecursionError:
        what = "it calls itself without end"
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        what = (f"line {line}: " if line else "") + str(error)
    except Exception as error:  # whatever else a template makes Python raise
        what = f"{type(error).__name__}: {error}"
    return {"kind": "broken", "error": what}


def _text(template: Any, request: dict[str, Any]) -> str:
    """The conversation as the template writes it.

    A template that knows no content but text fails at a message without one, or shows the list that its parts are in;
    then each message has the text that the parts make together.
    """
    messages = request["messages"]
    plain = [_plain(message) for message in messages]
    if plain == messages:
        return _render(template, request, messages)
    lists = [str(message["content"]) for message in messages if isinstance(message.get("content"), list)]
    try:
        text = _render(template, request, messages)
    except (Refused, TooLong, MemoryError, RecursionError):
        raise
    except Exception:  # as `answer_to`: of any kind
        return _render(template, request, plain)
    return _render(template, request, plain) if any(one in text for one in lists) else text


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content", "")
    parts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return {**message, "content": "\n".join(parts)}


def _probed(template: Any, request: dict[str, Any]) -> str:
    """What the template writes of the probe; nothing where it refuses it."""
    try:
        return _render(template, request, request["probe"])
    except Exception:  # the probe is no conversation that anybody asked for
        return ""


def _render(template: Any, request: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    parts, length = [], 0
    for part in template.generate(**{**request["variables"], "messages": messages}):
        length += len(part)
        if length > request["output_characters"]:
            raise TooLong
        parts.append(part)
    return "".join(parts)


def make_environment() -> Any:
    """The environment of Hugging Face transformers, in which authors of templates try them, without its loopholes."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks an assistant's words, for those who train on them; here they are as they are."""

        tags = {"generation"}  # noqa: RUF012 - so the base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


if __name__ == "__main__":
    main()
