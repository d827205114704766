"""A request as it was typed, made into token ids while the model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ..build import Model
from ..ir.errors import PolicyRefusal, UnsupportedModelError, UsageError
from ..medpsy.guard import guard_for
from ..medpsy.policy import Admission
from ..runtime.gguf.file import GgufFile
from ..runtime.tokenizer.bpe import Tokenizer
from ..runtime.tokenizer.end_tokens import named_end_tokens
from .messages import strings_in
from .template import ChatTemplate
from .thinking import Marks, marks_of_chat, marks_of_text


@dataclass(frozen=True)
class Request:
    """What to continue: exactly one of text and ids.

    chat      write the text as a user's turn, as the file's chat template says; system and thinking imply it.
    system    a system message before it.
    thinking  what the template calls enable_thinking; None leaves it to the template.
    template  another one than the file's default: the name of one of the file's, or a text; implies chat, as do
              variables, further ones for it by name.

    UsageError names options that do not go together.
    """

    text: str | None = None
    ids: Sequence[int] | None = None
    chat: bool = False
    system: str | None = None
    thinking: bool | None = None
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is not None and self.ids is not None:
            raise UsageError("the prompt: give either a text or --prompt-token-ids, not both")
        if not self.text and not self.ids:
            raise UsageError("the prompt is empty: give at least one token")
        if self.ids is not None and self.templated:
            given = {
                "--system": self.system is not None,
                "--chat": self.chat,
                "--thinking": self.thinking is not None,
                "--chat-template": self.template is not None,
                "--template-var": bool(self.variables),
            }
            named = next(option for option, there in given.items() if there)
            raise UsageError(f"{named} writes a text as a chat; it goes with --prompt, not with --prompt-token-ids")

    @property
    def templated(self) -> bool:
        """Whether the chat template is applied."""
        given = (self.system, self.thinking, self.template)
        return self.chat or bool(self.variables) or any(one is not None for one in given)

    def messages(self) -> list[dict[str, str]]:
        """The conversation, for the template."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.text or ""}]


class BackgroundTokenizer:
    """A tokenizer that a thread builds beside the weights: 150,000 tokens take a third of a second."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._building: Future[Tokenizer] | None = None

    def start(self, model: Model) -> None:
        """Begin, as soon as the file is open."""
        self._building = self._pool.submit(Tokenizer, model.file)

    def get(self) -> Tokenizer:
        """The tokenizer; UnsupportedModelError or ModelFileError where the file's is not to be had."""
        assert self._building is not None, "open the model first"
        return self._building.result()

    def get_or_none(self) -> Tokenizer | None:
        """None where the file's tokenizer is of another kind: ids work without one."""
        try:
            return self.get()
        except UnsupportedModelError:
            return None

    def wait(self) -> None:
        """Until it is built, or was found not to be possible: the file may be closed then."""
        if self._building is not None:
            self._building.exception()

    def close(self) -> None:
        """Wait for the thread."""
        self._pool.shutdown(wait=True)


def warnings_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the user should know about a plain prompt."""
    start = tokenizer.writes_start(text)
    if not start:
        return []
    return [f"the prompt begins with {start}, which the model's file puts there by itself; it is taken once"]


class Prompt:
    """A request's ids, and the tokenizer for the answer.

    Pass `positions` and `check` to `open_session`, then ask for `ids`, `marks` and `tokenizer`. Use it in a `with`
    statement.

    warnings  what the user should know about the prompt, once `ids` are there.
    """

    def __init__(self, request: Request, max_new_tokens: int, ctx: int | None = None) -> None:
        """ctx: the size of the context if the user gave one."""
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
        self.request = request
        self.tokenizer = BackgroundTokenizer()
        self._new, self._ctx = max_new_tokens, ctx
        self.warnings: list[str] = []
        self._template: ChatTemplate | None = None
        self._written = ""
        self._most = 0
        self._file: GgufFile | None = None
        self._ids = tuple(request.ids) if request.ids is not None else None

    def positions(self, model: Model) -> int:
        """Positions that prompt and answer fill as far as the model allows, or less where the context holds them.

        UsageError where the prompt alone is too long: nothing of it is ever left out.
        """
        self.tokenizer.start(model)
        request, limit = self.request, model.binding.context_limit
        self._file, self._most = model.file, self._ctx if self._ctx is not None else limit
        if request.templated:
            self._template = ChatTemplate.of_file(model.file, request.template)
        elif request.text is not None:
            bound = len(request.text.encode("utf-8", "surrogatepass")) + 1 + self._new  # no token has less than a byte
            if bound <= int(model.binding.sizes["context"]):
                return 1
        count, most = len(self.ids), self._most
        if count > most:
            if self._ctx is None:
                raise UsageError(
                    f"the prompt has {count} tokens, the model's context holds {limit}; shorten the prompt"
                )
            more = f", or give --ctx {count} or more" if count <= limit else ""
            raise UsageError(f"--ctx {most}: the prompt has {count} tokens; shorten it{more}")
        return min(count + self._new - 1, most)

    def check(self, admission: Admission) -> None:
        """PolicyRefusal with the policy's answer where the medical policy is active and refuses the request."""
        guard = guard_for(admission)
        if guard is None:
            return
        request = self.request
        text = request.text if request.text is not None else self.tokenizer.get().decode(self.ids)
        for part in (request.system or "", "\n".join(strings_in(request.variables)), text):
            decision = guard.classify(part)
            if decision.refused:
                raise PolicyRefusal(decision.message)

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        if self._ids is None:
            request, text, tokenizer = self.request, self.request.text or "", self.tokenizer.get()
            if self._template is not None:
                most = self._most * tokenizer.longest_token
                text = self._template.render(
                    request.messages(), request.thinking, variables=request.variables, most_characters=most
                )
            else:
                self.warnings += warnings_of(tokenizer, text)
            self._written, self._ids = text, tuple(tokenizer.encode(text, self._most))
        return self._ids

    def marks(self) -> Marks:
        """What in the answer is not simply text: where it ends, what is thinking."""
        file, tokenizer = self._file, self.tokenizer.get_or_none()
        assert file is not None, "open the model first"
        if tokenizer is None:
            return Marks(named_end_tokens(file))
        if self._template is None:
            return marks_of_text(file, tokenizer)
        return marks_of_chat(file, tokenizer, self._template, self._written)

    def __enter__(self) -> Prompt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tokenizer.close()
