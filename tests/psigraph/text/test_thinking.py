"""Thinking is told from the answer, whether its markers are control tokens or not, and where answers end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from listed import Listed
from tiny_model import Q4

from psigraph.runtime.gguf.file import open_gguf
from psigraph.runtime.tokenizer.bpe import Tokenizer
from psigraph.runtime.tokenizer.end_tokens import BY_TEMPLATE
from psigraph.text.generation import TextRun
from psigraph.text.template import KEY, ChatTemplate
from psigraph.text.thinking import Thinking, ends_of_file, markers_of, marks_of_chat, marks_of_text, thinking_of

QWEN = Thinking("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "answer"),
    [
        ("<think>\nhm\n</think>\n\nB", False, "hm", "B"),
        ("\n<think>hm</think>B\n", False, "hm", "B\n"),
        ("<think>\n\n</think>\n\nB", False, "", "B"),
        ("hm\n</think>\n\nB", True, "hm", "B"),
        ("<think>\nhm</think>B", True, "hm", "B"),
        ("<think>\nnot ended", False, "not ended", ""),
        ("not ended", True, "not ended", ""),
        ("B speaks of <think> and </think>.", False, "", "B speaks of <think> and </think>."),
        ("<think>a</think>B </think>", False, "a", "B </think>"),
        ("  B", False, "", "  B"),
        ("", False, "", ""),
    ],
)
def test_thinking_is_what_stands_before_the_answer(text: str, begun: bool, reasoning: str, answer: str) -> None:
    assert Thinking("<think>", "</think>", begun).split(text) == (reasoning, answer)


@pytest.mark.parametrize(
    ("source", "prompt", "wanted"),
    [
        ("{% if '</think>' in content %}", "<|im_start|>assistant\n", QWEN),
        ("{% if '</think>' in content %}", "assistant\n<think>\n", Thinking("<think>", "</think>", True)),
        ("{% if '</think>' in content %}", "<think>\n\n</think>\n\n", QWEN),
        ("[THINK]{{ x }}[/THINK]", "", Thinking("[THINK]", "[/THINK]")),
        ("{{ messages[0].content }}", "<think>", None),
    ],
)
def test_a_template_says_how_thinking_is_marked(source: str, prompt: str, wanted: Thinking | None) -> None:
    assert thinking_of(source, prompt) == wanted


def test_a_templates_own_markers_come_in_pairs() -> None:
    source = "<|im_end|> </s> '</think>' '<tool_call>' '\n</tool_call>' [/INST] <|END_THINKING|>"
    assert markers_of(source) == {
        "<think>", "</think>", "<tool_call>", "</tool_call>", "[INST]", "[/INST]",
        "<|START_THINKING|>", "<|END_THINKING|>",
    }  # fmt: skip


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|over|>\n{% endfor %}assistant: "
    "{% if enable_thinking is defined %}<think>{% endif %}"
)


def a_file(kind: int, **changes: Any) -> Any:
    """The tiny model's header with <think>, </think> and <|over|> as tokens of a kind: 3 control, 4 user-defined."""
    with open_gguf(Q4) as file:
        metadata = dict(file.metadata)
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].copy()
    for index, token in enumerate(("<think>", "</think>", "<|over|>")):
        tokens[4000 + index], types[4000 + index] = token, kind
    kept = [merge for merge in metadata["tokenizer.ggml.merges"] if merge.replace(" ", "") in set(tokens)]
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": kept}
    metadata |= {KEY: TEMPLATE, **changes}
    return SimpleNamespace(metadata=metadata, value_offsets={})


@pytest.mark.parametrize("kind", [3, 4])
def test_markers_are_shown_and_split_off_of_whatever_kind_their_tokens_are(kind: int) -> None:
    file = a_file(kind)
    tokenizer, template = Tokenizer(file), ChatTemplate.of_file(file)
    prompt = template.render([{"role": "user", "content": "A"}])
    marks = marks_of_chat(file, tokenizer, template, prompt)
    said = tokenizer.encode("<think>hm</think>B<|im_start|>")
    run = TextRun(Listed(said), tokenizer, marks=marks)  # type: ignore[arg-type]
    assert "".join(run) == run.text == "<think>hm</think>B"
    assert (run.reasoning, run.answer) == ("hm", "B")
    assert marks.ends[-1].id == 4002
    assert marks.ends[-1].sources == (BY_TEMPLATE,)
    plain = TextRun(Listed(said), tokenizer, marks=marks_of_text(file, tokenizer))  # type: ignore[arg-type]
    assert "".join(plain) == plain.answer == "<think>hm</think>B"
    # The same prompt with the marker at its end: the answer begins inside.
    begun = marks_of_chat(file, tokenizer, template, prompt + "<think>")
    inside = TextRun(Listed(tokenizer.encode("hm</think>B")), tokenizer, marks=begun)  # type: ignore[arg-type]
    assert ("".join(inside), inside.reasoning, inside.answer) == ("hm</think>B", "hm", "B")


def test_a_files_end_tokens_are_told_with_its_templates() -> None:
    assert [(end.id, end.sources[-1]) for end in ends_of_file(a_file(3))] == [
        (4095, "its text"), (4093, "its text"), (4002, BY_TEMPLATE),
    ]  # fmt: skip
    for template in ("", "{% for %}", "{{ raise_exception('no') }}"):
        assert [end.id for end in ends_of_file(a_file(3, **{KEY: template}))] == [4095, 4093]
