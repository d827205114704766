"""The process in which a chat template is rendered; template.py runs it as a script, so it imports nothing of psigraph.

stdin: a JSON object of source, variables, and the limits cpu_seconds, memory_bytes, output_characters.
stdout: a JSON object of text, or of error and kind ("refused": the template itself says no; "broken"; "limit").
The limits are the kernel's, set after the imports and before the template is looked at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn


class Refused(Exception):
    """The template called raise_exception."""


def main() -> None:
    """Renders one template. argv: folders in which jinja2 and its one dependency lie."""
    # `python -S` starts without site-packages, which is faster and runs no code of other packages.
    sys.path += sys.argv[1:]
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    request = json.load(sys.stdin.buffer)
    environment = _environment()
    # What Python imports only when it is needed could not be read any more: codecs, the parts that show errors.
    environment.from_string(r"{{ 'a\n' | tojson }}{{ strftime_now('%d') }}").render()
    _limit(request["cpu_seconds"], request["memory_bytes"])
    try:
        text = environment.from_string(request["source"]).render(**request["variables"])
        if len(text) > request["output_characters"]:
            raise MemoryError
        answer = {"text": text}
    except Refused as error:
        answer = {"kind": "refused", "error": str(error)}
    except SecurityError as error:
        answer = {"kind": "broken", "error": f"the sandbox forbids it: {error}"}
    except MemoryError:
        answer = {"kind": "limit", "error": "memory"}
    except RecursionError:
        answer = {"kind": "broken", "error": "it calls itself without end"}
    except OSError:
        answer = {"kind": "broken", "error": "it wants to open a file"}
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        answer = {"kind": "broken", "error": (f"line {line}: " if line else "") + str(error)}
    except Exception as error:  # whatever else a template makes Python raise
        answer = {"kind": "broken", "error": f"{type(error).__name__}: {error}"}
    environment = text = request = None
    json.dump(answer, sys.stdout)
    sys.stdout.flush()


def _environment() -> Any:
    """The environment of Hugging Face transformers, in which authors of templates try them, without its loopholes."""
    import jinja2.debug
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: object) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """No more than this much processor time and further memory; no file, no process, no core dump from here on."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for name, most in (
        ("RLIMIT_AS", used + memory_bytes),
        ("RLIMIT_CPU", cpu_seconds),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 3),
        ("RLIMIT_NPROC", 0),
    ):
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
    main()
