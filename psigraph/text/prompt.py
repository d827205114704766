"""A request as it was typed, made into token ids while the model loads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from ..build import Model
from ..ir.errors import PolicyRefusal, UnsupportedModelError, UsageError
from ..medpsy.guard import guard_for
from ..medpsy.policy import Admission
from ..runtime.tokenizer.bpe import Tokenizer
from .template import ChatTemplate


@dataclass(frozen=True)
class Request:
    """What to continue: exactly one of text and ids.

    chat      write the text as a user's turn, as the file's chat template says; system and thinking imply it.
    system    a system message before it.
    thinking  what the template calls enable_thinking; None leaves it to the template.

    UsageError names options that do not go together.
    """

    text: str | None = None
    ids: Sequence[int] | None = None
    chat: bool = False
    system: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.ids is not None:
            raise UsageError("the prompt: give either a text or --prompt-token-ids, not both")
        if not self.text and not self.ids:
            raise UsageError("the prompt is empty: give at least one token")
        if self.ids is not None and self.templated:
            named = "--system" if self.system is not None else "--chat" if self.chat else "--thinking"
            raise UsageError(f"{named} writes a text as a chat; it goes with --prompt, not with --prompt-token-ids")

    @property
    def templated(self) -> bool:
        """Whether the chat template is applied."""
        return self.chat or self.system is not None or self.thinking is not None

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


class Prompt:
    """A request's ids, and the tokenizer for the answer.

    Pass `positions` and `check` to `open_session`, then ask for `ids` and `tokenizer`. Use it in a `with` statement.
    """

    def __init__(self, request: Request, max_new_tokens: int, ctx: int | None = None) -> None:
        """ctx: the size of the context if the user gave one."""
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {max_new_tokens}: at least 1 is needed")
        self.request = request
        self.tokenizer = BackgroundTokenizer()
        self._new, self._ctx = max_new_tokens, ctx
        self._template: ChatTemplate | None = None
        self._most: int | None = None
        self._ids = tuple(request.ids) if request.ids is not None else None

    def positions(self, model: Model) -> int:
        """Positions that prompt and answer fill as far as the model allows, or less where the context holds them.

        UsageError where the prompt alone is too long: nothing of it is ever left out.
        """
        self.tokenizer.start(model)
        request, limit = self.request, model.binding.context_limit
        if request.templated:
            self._template = ChatTemplate.of_file(model.file)
        elif request.text is not None:
            bound = len(request.text.encode("utf-8", "surrogatepass")) + 1 + self._new  # no token has less than a byte
            if bound <= int(model.binding.sizes["context"]):
                return 1
        self._most = most = self._ctx if self._ctx is not None else limit
        count = len(self.ids)
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
        for part in (request.system or "", text):
            decision = guard.classify(part)
            if decision.refused:
                raise PolicyRefusal(decision.message)

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        if self._ids is None:
            text = self.request.text or ""
            if self._template is not None:
                text = self._template.render(self.request.messages(), self.request.thinking)
            self._ids = tuple(self.tokenizer.get().encode(text, self._most))
        return self._ids

    def __enter__(self) -> Prompt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tokenizer.close()
