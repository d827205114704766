"""Every way in which a command can end: its exit code, and at most one line on stderr."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from tiny_model import Q4

import psigraph.cli
from psigraph.cli import COMMANDS, main, run
from psigraph.cli.exit_codes import EXIT_CODES
from psigraph.ir import errors
from psigraph.ir.types import CACHE_DTYPES
from psigraph.printable import printable

CLI = Path(psigraph.cli.__file__).parent


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Exit code of a command that raises the error."""

    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(main, "get_command", lambda ctx, name: command)
    return run(["doctor"])


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m psigraph ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "psigraph", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_each_command_file_is_registered() -> None:
    names = {
        path.stem.replace("_", "-")
        for path in CLI.glob("*.py")
        if any(line.startswith(("def command(", "command = ")) for line in path.read_text().splitlines())
    }
    assert names == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: psigraph {name}" in shown
    assert f"psigraph {name}" in shown.partition("Example")[2]


def test_kv_type_is_an_option_wherever_a_context_is(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        options = {param.name: param for param in command.params}
        assert ("ctx" not in options) or ("kv_type" in options), name
        if "kv_type" in options:
            kind = options["kv_type"].type
            assert isinstance(kind, click.Choice)
            assert tuple(kind.choices) == CACHE_DTYPES
            given = ["--model-path", str(Q4)] if name == "bench" else [str(Q4)]
            assert run([name, *given, "--kv-type", "q4"]) == 2
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1, shown
            assert "--kv-type" in shown
            assert "'f16', 'q8'" in shown


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_commands_and_exit_codes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in shown
        assert summary.split()[0] in shown
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"psigraph {psigraph.__version__}\n"


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys, psigraph.cli; psigraph.cli.run(['--help']);"
        "print([name for name in ('numpy', 'cuda', 'rich', 'networkx', 'yaml', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def error_classes() -> list[type[errors.PsigraphError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", error_classes())
def test_each_error_has_its_documented_code(
    kind: type[errors.PsigraphError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kind.exit_code in EXIT_CODES
    assert raising(monkeypatch, kind("--size 9b: choose 8b")) == kind.exit_code
    assert capsys.readouterr().err == "psigraph: --size 9b: choose 8b\n"


def test_codes_of_errors_differ() -> None:
    codes = [kind.exit_code for kind in error_classes()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
        (MemoryError(), 8, "main memory is used up"),
        (PermissionError(13, "Permission denied", "/a/b"), 74, "psigraph: /a/b: Permission denied"),
        (OSError(5, "Input/output error"), 74, "psigraph: Input/output error"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 11, "'gguf' is missing; `psigraph doctor`"),
        (ModuleNotFoundError("No module named 'psigraph.x'", name="psigraph.x"), 70, "this is a defect"),
        (ValueError("seven"), 70, "psigraph: ValueError: seven; this is a defect; rerun with PSIGRAPH_DEBUG=1"),
        (click.UsageError("Either --a or --b"), 2, "psigraph: either --a or --b (see `psigraph doctor --help`)"),
        (click.FileError("x.gguf", "gone"), 1, "x.gguf"),
    ],
)
def test_other_endings(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PSIGRAPH_DEBUG", raising=False)
    assert raising(monkeypatch, error) == code
    assert code in EXIT_CODES
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == (1 if line else 0)


@pytest.mark.parametrize(("value", "traced"), [("1", True), ("3", True), ("0", False), ("", False)])
def test_traceback_on_demand(
    value: str, traced: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PSIGRAPH_DEBUG", value)
    assert raising(monkeypatch, ValueError("seven")) == 70
    assert ("Traceback" in capsys.readouterr().err) == traced


def test_a_command_returns_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "get_command", lambda ctx, name: click.Command("doctor", callback=lambda: 1))
    assert run(["doctor"]) == 1


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import warnings, psigraph.cli as c; c.run(['--version']); warnings.warn('no cache')"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "psigraph: warning: no cache\n"


def test_a_warning_from_several_places_is_shown_once() -> None:
    code = """
import warnings, psigraph.cli as c
c.run(['--version'])
warnings.warn('no cache')
warnings.warn('no cache')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "psigraph: warning: no cache\n"


def test_inspect_says_what_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path)]) == errors.ModelFileError.exit_code
    assert "is neither a model file nor a folder" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path), "--stage", "program", "--format", "dot"]) == 2
    assert "--stage program has no --format dot, only graphs do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bnech"], "there is no command 'bnech'; the commands are "),
        (["--frobnicate"], "no such option"),
        (["doctor", "--frobnicate"], "(see `psigraph doctor --help`)"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_wrong_usage(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("psigraph: ")
    assert line in shown
    assert shown.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "psigraph", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


def test_shell_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_PSIGRAPH_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "psigraph doc")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("tensor \x1b[2J\x07 é\n ^^") == "tensor \\x1b[2J\\x07 é\n ^^"
    assert printable("\udcff") == "\\udcff"


@pytest.mark.parametrize("command", ["compile", "inspect", "generate", "bench", "compare", "ablate"])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        (b"%PDF-1.7 and so on", "not a GGUF file: it starts"),
        (b"", "not a whole GGUF file"),
    ],
)
def test_what_is_no_model_is_named_alike_everywhere(
    command: str, content: bytes | None, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.gguf"
    if content is not None:
        model.write_bytes(content)
    given = {
        "generate": [str(model), "--prompt", "a", "--backend", "cpu"],
        "bench": ["--model-path", str(model), "--backend", "cpu"],
        "compare": ["--model", str(model), "--llama-bench", "x", "--out-dir", str(tmp_path / "out")],
        "ablate": [str(model), "--backend", "host"],
    }
    assert run([command, *given.get(command, [str(model)])]) == errors.ModelFileError.exit_code
    shown = capsys.readouterr().err
    assert named in shown
    assert "m.gguf" in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_said_once() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "psigraph", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 74
    assert done.stderr == b"psigraph: stdout: No space left on device\n"


def test_a_closed_stdout_is_no_defect() -> None:
    model = Path(__file__).parents[3] / "fixtures" / "tiny" / "tiny-qwen3-q4_k_m.gguf"
    generate = ["generate", str(model), "--backend", "cpu", "--prompt-token-ids", "0", "--max-new-tokens", "2"]
    for arguments in (["--version"], generate):
        line = " ".join(map(shlex.quote, [sys.executable, "-m", "psigraph", *arguments]))
        done = subprocess.run(["sh", "-c", f"exec {line} >&-"], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        assert "defect" not in done.stderr


def test_names_that_are_not_utf_8_are_shown(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"absent-\xff.gguf")
    done = subprocess.run([sys.executable, "-m", "psigraph", "inspect", name], capture_output=True)
    assert done.returncode == 3
    assert b"absent-" in done.stderr
    code = """
import click, psigraph.cli
psigraph.cli.main.get_command = lambda *_: click.Command("x", callback=lambda: click.echo("report: \\udcff"))
raise SystemExit(psigraph.cli.run(["doctor"]))
"""
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=strict, check=False)
    assert (done.returncode, done.stdout) == (0, b"report: \\udcff\n")


def test_an_empty_path_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["bench", "--model-path", ""], ["compile", ""], ["matrix", "--out", ""], ["synth", ""]):
        assert run(arguments) == 2
        assert "the name is empty" in capsys.readouterr().err


def test_ctrl_c_during_the_imports_is_quiet() -> None:
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from psigraph.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_python_dash_m() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"psigraph {psigraph.__version__}\n", "")
    assert program("nothing").returncode == 2
