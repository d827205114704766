"""A model's lives: asked from many threads, while it writes, once it is closed, dropped, or forked."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nano import write_nano

import psigraph
from psigraph import api
from psigraph.api import LanguageModel
from psigraph.ir.errors import PsigraphError, UsageError
from psigraph.runtime import host
from psigraph.runtime.synth.model import SMALLEST
from psigraph.text.turns import Written

PROMPTS = [[1, 2], [3, 4, 5], [6], [1, 2, 7]]
DRAWN = {"temperature": 1.0, "seed": 3}
BACKENDS = ("cpu", "host")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("nano"), vocab=SMALLEST + 64)


def loaded(path: Path, backend: str, **options: Any) -> LanguageModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return psigraph.load(path, backend, ctx=48, **options)


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, nano: Path) -> Iterator[LanguageModel]:
    with loaded(nano, request.param) as made:
        yield made
    if request.param == "host":
        assert host.violations() == []


def alone(model: LanguageModel, prompt: list[int], **sampling: Any) -> list[int]:
    return list(model.generate(prompt, 12, **sampling))


def test_any_number_of_threads_and_tasks_may_ask(model: LanguageModel) -> None:
    wanted = [alone(model, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: alone(model, prompt), PROMPTS * 3)) == wanted * 3

    async def tasks() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(alone, model, prompt) for prompt in PROMPTS))

    assert asyncio.run(tasks()) == wanted
    # A server asks for each piece in another thread, and for several texts in turns.
    texts = [model.generate(prompt, 12) for prompt in PROMPTS]
    given: list[list[int]] = [[] for _ in texts]
    for _ in range(13):
        for text, tokens in zip(texts, given, strict=True):
            with ThreadPoolExecutor(1) as pool:
                tokens += pool.submit(lambda text=text: [token for token in [next(text, None)] if token]).result()
    assert given == [[token for token in tokens if token] for tokens in wanted]


@pytest.mark.parametrize(
    "other",
    [
        lambda model: model.logits([1, 2]),
        lambda model: alone(model, [4], **DRAWN),
        lambda model: list(model.generate([4], 2, logprobs=1)),
        lambda model: "".join(model.generate("a", 3)),
    ],
    ids=["logits", "sampled", "logprobs", "text"],
)
def test_another_request_does_not_cut_an_answer_short(
    model: LanguageModel, other: Callable[[LanguageModel], Any]
) -> None:
    wanted = alone(model, PROMPTS[0])
    answer = model.generate(PROMPTS[0], 12)
    given = [next(answer)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(other, model).result()  # it ends, though nobody reads the answer
    assert given + list(answer) == wanted
    assert answer.reason in ("length", "end")


def test_a_request_that_has_not_begun_changes_nothing(model: LanguageModel) -> None:
    first = model.generate([1], 12, **DRAWN)
    second = model.generate([1], 12, temperature=1.0, seed=4)
    wanted = [alone(model, [1], temperature=1.0, seed=seed) for seed in (3, 4)]
    assert [list(first), list(second)] == wanted
    assert wanted[0] != wanted[1]


EVERY_CALL: list[Callable[[LanguageModel], Any]] = [
    lambda model: list(model.generate([1], 2)),
    lambda model: model.generate("a"),
    lambda model: model.chat([{"role": "user", "content": "a"}]),
    lambda model: model.logits([1]),
    lambda model: model.encode("a"),
    lambda model: model.decode([1]),
    lambda model: model.context,
    lambda model: model.vocabulary,
    lambda model: model.tokenizer,
    lambda model: model.template,
    lambda model: model.session,
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_once_closed_every_call_says_so(backend: str, nano: Path) -> None:
    model = loaded(nano, backend, outputs=("logits",))
    reading, unbegun = model.generate([1, 2], 12), model.generate([1, 2], 12)
    assert next(reading) is not None
    session = model.session
    model.close()
    model.close()
    for call in (*EVERY_CALL, lambda _: next(reading), lambda _: next(unbegun)):
        with pytest.raises(UsageError, match="this model is closed; load it again"):
            call(model)
    assert (list(reading), reading.reason) == ([], "interrupted")
    calls: list[Callable[[], Any]] = [
        lambda: session.feed([1]),
        lambda: session.forced_logits([1]),
        lambda: list(session.decode(2)),
        lambda: session.rewind(0),
        session.reset,
        lambda: session.expect_prompt(512),
        session.engine.chosen,
        session.engine.logits,
        lambda: session.engine.set_constant("end_tokens", np.zeros(8, np.int32)),
        lambda: session.engine.step_times(1),
    ]
    for one in calls[:5] + calls[6:] if backend == "cpu" else calls:  # numpy prepares nothing
        with pytest.raises(UsageError, match="closed"):
            one()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_refers_to_is_freed_at_once(backend: str, nano: Path) -> None:
    host.activate(sms=4)
    before, files = host.live(), len(os.listdir("/proc/self/fd"))
    gc.collect()
    gc.disable()
    try:
        model = loaded(nano, backend)
        gone = weakref.ref(model.session)
        list(model.generate([1], 2, **DRAWN))  # loaded anew
        assert gone() is None
        gone = weakref.ref(model.session)
        answer = model.generate([1], 12)
        assert next(answer) is not None
        del model
        assert gone() is not None  # somebody reads its answer
        assert next(answer) is not None
        del answer
        assert gone() is None
        text = loaded(nano, backend).generate("a", 12)
        assert next(text)
        del text
    finally:
        gc.enable()
    assert host.live() == before
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told(model: LanguageModel) -> None:
    wanted = alone(model, PROMPTS[0])
    answer = model.generate(PROMPTS[0], 12)
    given = [next(answer)]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = set()
        for call in (*EVERY_CALL, lambda _: next(answer), lambda _: answer.close()):
            try:
                call(model)
                said.add("nothing")
            except BaseException as error:
                said.add(f"{type(error).__name__}: {error}")
        model.close()
        del model, answer
        gc.collect()
        os.write(write, "; ".join(said).encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as pipe:
        assert pipe.read() == (
            f"UsageError: this model belongs to process {os.getpid()}, from which this one was forked; load it here, "
            "or start processes by spawn"
        )
    assert given + list(answer) == wanted


TALK = [{"role": "user", "content": "a"}]
WRONG: dict[str, Callable[[LanguageModel], Any]] = {
    "prompt[0] is 1.5": lambda model: model.generate([1.5]),
    "prompt[0] is True": lambda model: model.generate([True]),
    "prompt[0] is 'a'": lambda model: model.generate(["a"]),
    "prompt[0] is ": lambda model: model.generate(np.array([1.5])),  # numpy 1 and 2 write it differently
    "prompt is b'a' (bytes); give a text, or a list of token ids": lambda model: model.generate(b"a"),
    "prompt is None": lambda model: model.generate(None),
    "max_new_tokens is 2.5 (float); give a whole number, or None": lambda model: model.generate("a", 2.5),
    "max_new_tokens is True": lambda model: model.generate("a", True),
    "stop is 'b' (str); give a list of strings": lambda model: model.generate("a", stop="b"),
    "one of stop is 1": lambda model: model.generate("a", stop=[1]),
    "logprobs is 1.5": lambda model: model.generate("a", logprobs=1.5),
    "thinking is 'yes' (str); give True, False or None": lambda model: model.chat(TALK, thinking="yes"),
    "cancelled is 3": lambda model: model.chat(TALK, cancelled=3),
    "messages is 5": lambda model: model.chat(5),
    "text is b'a'": lambda model: model.encode(b"a"),
    "ids[0] is 1.5": lambda model: model.decode([1.5]),
    "ids is 'ab'": lambda model: model.logits("ab"),
    "ids[0] is True": lambda model: model.logits([True]),
    "token id 1.5 is no whole number": lambda model: model.session.feed([1.5]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ctx is 2.5 (float); give a whole number, or None": {"ctx": 2.5},
    "ctx is True": {"ctx": True},
    "ctx is '8'": {"ctx": "8"},
    "device is 1.5": {"device": 1.5},
    "backend is 3": {"backend": 3},
    "sampling is 3": {"sampling": 3},
    "outputs is 'logits'": {"outputs": "logits"},
    "expect_sha256 is 3": {"expect_sha256": 3},
    "load has no option contxt": {"contxt": 3},
}


@pytest.fixture(scope="module")
def numpy_model(nano: Path) -> Iterator[LanguageModel]:
    with loaded(nano, "cpu") as made:
        yield made


@pytest.mark.parametrize("named", WRONG)
def test_wrong_types_are_named(numpy_model: LanguageModel, named: str) -> None:
    with pytest.raises(TypeError) as caught:
        WRONG[named](numpy_model)
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("named", OPTIONS)
def test_wrong_types_of_options_are_named(nano: Path, named: str) -> None:
    with pytest.raises(TypeError) as caught:
        psigraph.load(nano, **{"backend": "cpu", **OPTIONS[named]})
    assert str(caught.value).startswith(named)


def test_paths_and_biases_of_a_wrong_type(numpy_model: LanguageModel) -> None:
    with pytest.raises(TypeError, match=r"path is b'model\.gguf'"):
        psigraph.load(b"model.gguf", "cpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"logit_bias is \[1\]"):
        numpy_model.generate([1], logit_bias=[1])
    assert list(numpy_model.generate(np.array([1, 2]), np.int64(2))) == list(numpy_model.generate([1, 2], 2))


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda path: psigraph.load(path, "gpu"), "^backend gpu: choose one of"),
        (lambda path: psigraph.load(path, "cpu", device=3), "^device 3: .* or take backend cuda$"),
        (lambda path: psigraph.load(path, "cpu", kv_type="q4"), "^kv_type q4: choose"),
        (lambda path: psigraph.load(path, "cpu", expect_sha256="x"), "^expect_sha256 x: give"),
        (lambda path: psigraph.compile(path, arches=["sm_1"]), "^arch sm_1: unknown"),
        (lambda path: psigraph.load(path, "cpu", chat_template=" "), "^chat_template: the name is empty"),
        (
            lambda path: psigraph.load(path, "cpu", template_vars={"none": 1}).chat([{"role": "user", "content": "a"}]),
            "^template_vars none: ",
        ),
        (lambda path: loaded(path, "cpu").generate([1] * 49), r"or give a larger ctx \(up to 64\)$"),
        (lambda path: loaded(path, "cpu").logits([1] * 49), "give a larger ctx$"),
        (
            lambda path: loaded(path, "cpu").chat([{"role": "user", "content": "a " * 99}]),
            r"or give a larger ctx \(up to 64\)$",
        ),
    ],
)
def test_errors_speak_of_parameters(nano: Path, ask: Callable[[Path], Any], named: str) -> None:
    with pytest.raises(PsigraphError, match=named) as caught:
        ask(nano)
    assert "--" not in str(caught.value)


def test_while_a_model_is_loaded_anew_others_wait_and_close_waits(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(nano, "cpu")
    reading, go_on = threading.Event(), threading.Event()
    opened = api.open_session

    def slowly(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return opened(*arguments)

    monkeypatch.setattr(api, "open_session", slowly)
    with ThreadPoolExecutor(3) as pool:
        drawn = pool.submit(lambda: list(model.generate([1], 2, seed=1)))
        assert reading.wait(30)
        assert model.encode("a")
        assert model.context
        other = pool.submit(lambda: list(model.generate([1], 2)))
        closed = pool.submit(model.close)
        go_on.set()
        for asked in (drawn, other):
            with suppress(UsageError):  # the closing goes first where it can
                asked.result(30)
        closed.result(30)
    with pytest.raises(UsageError, match="closed"):
        model.generate([1])


@pytest.mark.parametrize("options", [{"chat_template": 5}, {"template_vars": [1]}, {"template_vars": "ab"}])
def test_wrong_types_of_templates(nano: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(options))} is "):
        psigraph.load(nano, "cpu", **options)


def test_numbers_of_numpy_are_numbers(nano: Path) -> None:
    with loaded(nano, "cpu") as model:
        drawn = list(model.generate([1], 4, seed=np.int64(2), temperature=np.float32(0.5)))
        assert drawn == list(model.generate([1], 4, seed=2, temperature=0.5))


def test_a_text_that_was_left_in_the_middle_is_dropped(nano: Path) -> None:
    with loaded(nano, "cpu") as model:
        for _ in model.generate("a", 40):
            break
        kept = model.generate("a", 40)
        next(kept)
        known, position = weakref.ref(kept), model.session.position
        gc.disable()
        try:
            del kept
            assert known() is None
            list(model.generate([1], 2))
        finally:
            gc.enable()
        assert model.session.position < position + 40


def test_a_model_that_found_no_gpu_is_freed_too(nano: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = psigraph.load(nano)
    known = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert known() is None
    finally:
        gc.enable()


def test_closing_does_not_wait_for_whoever_reads_a_long_answer(nano: Path) -> None:
    model = loaded(nano, "cpu")
    begun = threading.Event()

    def read() -> str:
        text = model.generate([1], 60, logit_bias={})
        for _ in text:
            begun.set()
        return text.reason

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert begun.wait(30)
        model.close()
        with suppress(UsageError):  # "closed", unless it was at its end
            reading.result(30)
    with pytest.raises(UsageError, match="closed"):
        model.encode("a")


def test_an_interrupt_while_another_text_is_computed_is_told_to_its_reader(
    nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(nano, "cpu") as model:
        first = model.generate([1], 40)
        next(first)

        with monkeypatch.context() as patch:
            patch.setattr(Written, "compute", _interrupting(Written.compute))
            with pytest.raises(KeyboardInterrupt):
                list(model.generate([1], 2))
        with pytest.raises(UsageError, match="interrupted while another request computed it"):
            list(first)


def _interrupting(compute: Any) -> Any:
    class Stopped:
        def __next__(self) -> Any:
            raise KeyboardInterrupt

        def close(self) -> None:
            """Nothing is under way."""

    def with_interrupt(self: Any, mine: bool = True) -> None:
        self.pieces = Stopped()
        compute(self, mine)

    return with_interrupt
