"""The package's own face: load and compile, from nothing but `import psigraph`."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_model import Q4, divergence, reference_greedy, reference_logits

import psigraph
from psigraph import api
from psigraph.api import LanguageModel
from psigraph.ir.errors import PolicyRefusal, UsageError
from psigraph.options import SessionOptions
from psigraph.session import Session, open_session
from psigraph.text.template import ChatTemplate

REQUEST = "Do I have cancer? Diagnose me."


@pytest.fixture(scope="module")
def tiny() -> Iterator[LanguageModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the policy has no word for a file that is not MedPsy
        model = psigraph.load(Q4, "cpu", ctx=96)
    with model:
        yield model


def test_every_block_of_the_documents_example_prints_what_stands_below_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    blocks = re.findall(r"```(python)?\n(.*?)```", (root / "docs" / "python-api.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        for (kind, code), (shown_kind, shown) in itertools.pairwise([*blocks, ("python", "")]):
            if kind:
                exec(code, names)
                assert capsys.readouterr().out == ("" if shown_kind else shown)
    assert sum(kind == "python" for kind, _ in blocks) == 10


def test_token_ids_are_continued_by_token_ids(tiny: LanguageModel) -> None:
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    run = tiny.generate(prompt, 6)
    assert (list(run), run.reason) == (greedy[:6], "length")
    assert list(tiny.generate(np.array(prompt), 2)) == greedy[:2]
    tiny.session.reset()
    tiny.session.feed(prompt)
    assert [token for chunk in tiny.session.decode(4) for token in chunk] == greedy[:4]


def test_chat_writes_as_the_file_says_and_reads_nothing_twice(tiny: LanguageModel) -> None:
    _, greedy, _ = reference_greedy(Q4, "chat")
    talk = [{"role": "user", "content": "The state of the Union is strong."}]
    answer = tiny.chat(talk, 5)
    assert "".join(answer) == answer.text == tiny.tokenizer.decode(greedy[:5], skip_special=True)
    talk += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]
    more = tiny.chat(talk, 2, stop=["\n"], cancelled=lambda: False)
    assert list(more)
    assert more.timings()["reused_tokens"] >= 19 + 4


OWN = (
    "{{ tools | tojson if tools else 'none' }}|{{ mood }}|{% for m in messages %}"
    "{{ m.role }}={{ m.content.split('</think>')[-1] }}{{ m.tool_calls | length if m.tool_calls }}{{ m.name }}"
    "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}<think>"
)


def test_a_chat_has_tools_variables_and_a_template_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    talk = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "A", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "B", "name": "f"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = psigraph.load(Q4, "cpu", ctx=128, chat_template=tmp_path / "own.jinja", template_vars={"mood": "glad"})
    with model:
        answer = model.chat(talk, 4, tools=[{"name": "f"}])
        assert "".join(answer) == answer.reasoning
        assert answer.answer == ""
        written = model.decode(model._decoder._held)
        assert written.startswith(
            '[{"name": "f"}]|glad|developer=Be brief.<|im_end|>user=AAda<|im_end|>assistant=1<|im_end|>tool=Bf<think>'
        )
        # Both hold for one answer, and the model's own for the rest.
        list(model.chat(talk[1:2], 1, template_vars={"mood": "sad"}))
        assert model.decode(model._decoder._held).startswith("none|sad|user=AAda<think>")


def test_logits_are_the_references_and_leave_the_model_usable(tiny: LanguageModel) -> None:
    ids, wanted = reference_logits(Q4)
    found = tiny.logits(ids[:12])
    assert found.shape == (12, 4096)
    assert divergence(wanted[:12], found).max() <= 1e-6
    assert np.array_equal(tiny.logits(ids[:2]), found[:2])
    prompt, greedy, _ = reference_greedy(Q4, "one_token")
    run = tiny.generate(prompt, 3, logprobs=0)
    assert list(run) == greedy[:3]
    assert [(one.token, one.likeliest) for one in run.logprobs] == [(token, ()) for token in greedy[:3]]
    text = tiny.generate("The whale", 1, logprobs=1)
    assert "".join(text)
    assert text.logprobs[0].value < 0


def test_what_a_request_needs_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SessionOptions] = []

    def opening(path: Path, options: SessionOptions) -> Session:
        opened.append(options)
        return open_session(path, options)

    monkeypatch.setattr(api, "open_session", opening)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with psigraph.load(Q4, "cpu", ctx=32) as model:
            for _ in range(2):
                list(model.generate([5], 1))
                list(model.generate([5], 1, temperature=0.5, seed=1))
                model.logits([5])
            assert [(one.sampling, one.outputs) for one in opened] == [
                (False, ()), (True, ()), (True, ("logits",))
            ]  # fmt: skip
            assert model.encode("whale") == model.tokenizer.encode("whale")
        with psigraph.load(Q4, "cpu", ctx=32, sampling=True, outputs=("logits",)) as model:
            list(model.generate([5], 1, seed=1))
            model.logits([5])
        assert len(opened) == 4


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda model: model.generate(""), "prompt is empty"),
        (lambda model: model.generate([]), "prompt is empty"),
        (lambda model: model.generate([4096]), "ids are 0 to 4095"),
        (lambda model: model.generate([5] * 97), "prompt has 97 tokens, the context holds 96"),
        (lambda model: model.generate("a", 0), "max_new_tokens is 0"),
        (lambda model: model.generate("a", stop=[""]), "stop string is empty"),
        (lambda model: model.generate([5], stop=["b"]), "stop looks for text"),
        (lambda model: model.generate("a", heat=1), "heat is no option of sampling; the options are temperature"),
        (lambda model: model.generate("a", top_p=2), "top_p is 2"),
        (lambda model: model.generate("\udcff"), "not valid Unicode"),
        (lambda model: model.chat([]), "conversation is empty"),
        (lambda model: model.chat([{"role": "user", "content": "a"}], thinking=True), "cannot switch thinking"),
        (lambda model: model.logits([]), "prompt is empty"),
    ],
)
def test_requests_that_cannot_work(tiny: LanguageModel, ask: Callable[[LanguageModel], Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ask(tiny)


def test_the_medical_guard() -> None:
    with pytest.warns(UserWarning, match="quantized"):
        model = psigraph.load(Q4, "cpu", ctx=96, policy="medpsy")
    with model:
        assert model.guard is not None
        user, system = {"role": "user", "content": REQUEST}, {"role": "system", "content": REQUEST}
        hello = {"role": "user", "content": "What is a virus?"}
        for ask in (
            lambda: model.generate(REQUEST),
            lambda: model.generate(model.encode(REQUEST)),
            lambda: model.chat([user]),
            lambda: model.chat([user, {"role": "assistant", "content": "No."}, hello]),
            lambda: model.chat([system, hello]),
        ):
            with pytest.raises(PolicyRefusal):
                ask()
        answer = model.chat([hello], 2)
        assert next(answer).startswith(model.guard.disclaimer)
        assert "".join(answer) == answer.text


def test_a_file_that_is_refused_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    for options, error in (
        ({"expect_sha256": "0" * 64}, PolicyRefusal),
        ({"ctx": 4096}, UsageError),
        ({"policy": "x"}, UsageError),
    ):
        with pytest.raises(error):
            psigraph.load(Q4, "cpu", **options)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_names_of_the_package() -> None:
    assert psigraph.SamplerSettings(seed=3).seed == 3
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        psigraph.nothing  # noqa: B018 (asking is the test)


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    compilation = psigraph.compile(Q4, tmp_path / "out", arches=["sm_90a"], ctx=64)
    assert [built.arch for built in compilation.built] == ["sm_90a"]
    assert compilation.built[0].program.notes["context"] == 64
    assert (tmp_path / "out" / "program.json").is_file()
    with pytest.raises(UsageError, match="sm_90a"):
        psigraph.compile(Q4, arches=["sm_1"])


def test_a_cache_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with psigraph.load(Q4, "cpu", ctx=32, kv_type="q8") as model:
        assert model.session.kv_type == "q8"
        assert "".join(model.generate("The whale", max_new_tokens=4))
    with pytest.raises(UsageError, match=r"^kv_type q4: choose one of f16, q8"):
        psigraph.load(Q4, "cpu", kv_type="q4")
    monkeypatch.setenv("PSIGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    (built,) = psigraph.compile(Q4, arches=["sm_90a"], ctx=64, kv_type="q8").built
    assert built.program.buffer("k_cache.0").nbytes == 2 * 64 * 136


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, psigraph; print([name for name in ('numpy', 'cuda', 'gguf') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_guard_reads_a_request_with_the_users_turn_before_it_and_with_no_other() -> None:
    class Watching:
        seen: ClassVar[list[tuple[str, str]]] = []

        def classify(self, request: str, previous: str = "") -> Any:
            self.seen.append((request, previous))
            return SimpleNamespace(refused=False)

    model: Any = object.__new__(LanguageModel)
    model.guard, model._template_vars = Watching(), {"note": "a variable"}
    roles = ("system", "user", "assistant", "tool", "user", "developer")
    model.ask_guard([{"role": role, "content": f"{index} {role}"} for index, role in enumerate(roles)])
    seen = [("0 system", ""), ("1 user", ""), ("4 user", "1 user"), ("5 developer", "")]
    assert Watching.seen == seen
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    model.ask_guard([{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [{}]}])
    assert Watching.seen == [*seen, ("a\nb", "")]
    model._ask_guard_about([{"function": {"description": "a tool"}}], {"more": ["a list"]})
    assert Watching.seen[-1] == ("a tool\na list\na variable", "")


def test_texts_of_megabytes_are_refused_before_the_library_panics(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spaces, words = " " * 10_000_000, "{{ 'word ' * 3000000 }}"
    for ask in (tiny.encode, tiny.generate):
        with pytest.raises(UsageError, match="run of more than 1,048,576 characters"):
            ask(spaces)
    with pytest.raises(UsageError, match="too long for a context of 96 tokens"):
        tiny.generate("word " * 3_000_000)
    monkeypatch.setattr(tiny, "_template", ChatTemplate(words))
    with pytest.raises(UsageError, match=r"writes more than 1,632 characters .* the context cannot hold them"):
        tiny.chat([{"role": "user", "content": "Hi"}])
    assert capfd.readouterr() == ("", "")
