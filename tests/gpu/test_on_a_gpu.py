"""What only a GPU can show. `make test` leaves these out; scripts/gpu/evidence.sh runs them.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psigraph.ir.errors import UsageError
from psigraph.options import SessionOptions
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import SMALLEST, Size, write_synth
from psigraph.session import Session, open_session

pytestmark = pytest.mark.gpu

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
QUANTS = ("q4_k_m", "q8_0")
FUSIONS = tuple(step.name for step in PIPELINE if not step.lowering)


def tiny(quant: str, **options: Any) -> Session:
    return open_session(TINY / f"tiny-qwen3-{quant}.gguf", SessionOptions("cuda", **options))


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of each row, float64."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


@pytest.mark.parametrize("graph", [True, False], ids=["replayed", "eager"])
@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_those_of_the_reference(quant: str, graph: bool) -> None:
    with np.load(TINY / "reference_logits.npz") as stored:
        ids, want = stored["ids"].tolist(), stored[f"logits_{quant}"]
    with tiny(quant, outputs=("logits",), graph=graph) as session:
        got = session.forced_logits(ids)
        session.reset()
        again = session.forced_logits(ids)
    found = divergence(want, got)
    print(f"{quant} graph={graph}: mean KL {found.mean():.3e}, largest {found.max():.3e}")
    assert found.mean() <= 2e-4
    assert found.max() <= 1e-3
    assert got.tobytes() == again.tobytes()


@pytest.mark.parametrize("quant", QUANTS)
def test_greedy_choice_is_that_of_the_reference(quant: str) -> None:
    stored = json.loads((TINY / "reference_greedy.json").read_text())
    with tiny(quant) as session:
        for name, prompt in stored["prompts"].items():
            want = stored["greedy"][quant][name]
            if quant == "q4_k_m" and name in ("speech", "chat"):
                session.reset()
                session.feed(prompt["ids"])
                assert [token for chunk in session.decode(64) for token in chunk] == want["ids"], name
            session.reset()
            chosen = []
            for token in (None, *want["ids"][:-1]):  # teacher-forced on the recorded ids
                session.feed(prompt["ids"] if token is None else [token])
                chosen.append(session.engine.chosen())
            wrong = [
                step
                for step, (got, right, gap) in enumerate(zip(chosen, want["ids"], want["top2_gap"], strict=True))
                if gap >= 0.05 and got != right
            ]
            assert not wrong, (name, wrong)


@pytest.mark.parametrize("prefill", ["own", "library"])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_prompt_by_chunks_is_one_token_by_token(quant: str, prefill: str) -> None:
    ids = np.random.default_rng(7).integers(0, 4000, 513).tolist()
    want = {}
    with tiny(quant, outputs=("logits",), prefill="off") as session:
        for length in (1, 2, 31, 32, 33, 511, 512, 513):
            session.feed(ids[session.position : length])
            want[length] = session.engine.logits()
    try:
        opened = tiny(quant, outputs=("logits",), prefill=prefill)
    except UsageError as error:
        pytest.skip(str(error))
    with opened as session:
        for length, logits in want.items():
            runs = []
            for _ in range(2):
                session.reset()
                session.feed(ids[:length])
                runs.append(session.engine.logits())
            assert runs[0].tobytes() == runs[1].tobytes(), length
            assert divergence(logits[None], runs[0][None])[0] <= 5e-5, length
        assert "tokens at once" in session.prefill


def test_a_prompt_with_passes_off_is_one_token_by_token() -> None:
    """By other kernels, one op each; the same passes are off in the step that takes the last token."""
    ids = np.random.default_rng(7).integers(0, 4000, 300).tolist()
    rows = []
    for options in ({"prefill": "off"}, {"prefill": "own", "disable": FUSIONS}):
        with tiny("q4_k_m", outputs=("logits",), **options) as session:
            session.feed(ids)
            rows.append(session.engine.logits())
    found = divergence(rows[0][None], rows[1][None])[0]
    print(f"300 ids, all passes off: KL from token by token {found:.3e}")
    assert found <= 5e-5


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(16, 16, 2), (48, 16, 2), (48, 16, 8), (64, 4, 2), (80, 16, 4), (96, 8, 4), (128, 6, 2), (256, 2, 1)],
)
def test_heads_of_other_sizes(head_dim: int, heads: int, kv_heads: int, kv_type: str, tmp_path: Path) -> None:
    """Sizes whose rows are no whole 128 bytes, groups that are no power of two; a warp with one tile, two, three."""
    size = Size(2, 256, 256, heads, kv_heads, False, head_dim=head_dim, context=2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "odd", size)
        model = write_synth(tmp_path / "odd.gguf", "odd", "q4_k_m", 1, vocab=SMALLEST)
    ids = np.random.default_rng(head_dim).integers(0, 250, 1100).tolist()
    lengths = (1, 16, 17, 300, 513, 529, 1040, 1100)
    rows = {}
    for backend in ("cpu", "cuda"):
        options = SessionOptions(backend, outputs=("logits",), kv_type=kv_type, prefill="off")
        with open_session(model, options) as session:
            rows[backend] = []
            for length in lengths:
                session.feed(ids[session.position : length])
                rows[backend].append(session.engine.logits())
    found = divergence(np.stack(rows["cpu"]), np.stack(rows["cuda"]))
    print(f"head_dim {head_dim}, group {heads // kv_heads}, {kv_type}: largest KL {found.max():.3e}")
    assert found.max() <= (5e-5 if kv_type == "f16" else 1e-3)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_cache_in_8_bits(quant: str) -> None:
    """Steps and chunks lose what numpy loses, around the edges of tiles too.

    Not one by one: where a value lies between two integers the smallest difference decides, and later layers see it.
    """
    ids = np.random.default_rng(8).integers(0, 4000, 513).tolist()
    lengths = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 300, 513)
    model = TINY / f"tiny-qwen3-{quant}.gguf"

    def in_numpy(**options: Any) -> np.ndarray:
        rows = []
        with open_session(model, SessionOptions("cpu", outputs=("logits",), **options)) as session:
            for length in lengths:
                session.feed(ids[session.position : length])
                rows.append(session.engine.logits())
        return np.stack(rows)

    exact = in_numpy(cache_dtype="f32")
    loss = divergence(exact, in_numpy(kv_type="q8"))
    ways: tuple[dict[str, Any], ...] = (
        {"prefill": "off"},
        {"prefill": "own"},
        {"prefill": "off", "disable": ("fuse_attention", "fuse_rope_append")},
    )
    for options in ways:
        rows = []
        with tiny(quant, outputs=("logits",), kv_type="q8", **options) as session:
            for length in lengths:
                runs = []
                for _ in range(2):
                    session.reset()
                    session.feed(ids[:length])
                    runs.append(session.engine.logits())
                assert runs[0].tobytes() == runs[1].tobytes(), (options, length)
                rows.append(runs[0])
        found = divergence(exact, np.stack(rows))
        print(f"{quant} q8 cache, {options}: mean KL {found.mean():.3e}, in numpy {loss.mean():.3e}")
        assert found.mean() <= 2 * loss.mean(), options
        assert found.max() <= 4 * loss.max(), options


@pytest.fixture(scope="module")
def real_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synth(tmp_path_factory.mktemp("models") / "synth-1.7b.gguf", "1.7b", "q4_k_m", seed=1)


def test_a_model_of_real_size_repeats_itself_and_keeps_within_its_memory(real_size: Path) -> None:
    with open_session(real_size, SessionOptions("cuda", ctx=4096 + 64)) as session:
        assert session.program is not None
        weights = sum(buffer.nbytes for buffer in session.program.buffers if buffer.kind == "weight")
        cache = sum(buffer.nbytes for buffer in session.program.buffers if buffer.kind == "state")
        assert session.engine.arena_bytes <= weights + cache + 256 * 2**20  # type: ignore[attr-defined]
        runs = []
        for _ in range(2):
            session.reset()
            session.feed([151644])
            runs.append([token for chunk in session.decode(512) for token in chunk])
        assert runs[0] == runs[1]
        assert len(set(runs[0])) > 16
        session.feed([1] * (4096 - session.position))  # depth 4,096 works
        assert len([token for chunk in session.decode(16) for token in chunk]) == 16


@pytest.mark.parametrize("prefill", ["own", "library"])
def test_a_long_prompt_of_a_model_of_real_size_is_one_token_by_token(real_size: Path, prefill: str) -> None:
    ids = np.random.default_rng(9).integers(0, 150_000, 4096).tolist()
    options: dict[str, Any] = {"ctx": 4200, "outputs": ("logits",)}
    with open_session(real_size, SessionOptions("cuda", prefill="off", **options)) as session:
        session.feed(ids)
        want, first = session.engine.logits(), session.engine.chosen()
    try:
        opened = open_session(real_size, SessionOptions("cuda", prefill=prefill, **options))
    except UsageError as error:
        pytest.skip(str(error))
    with opened as session:
        runs = []
        for _ in range(2):
            session.reset()
            session.feed(ids)
            logits = session.engine.logits()
            runs.append((logits.tobytes(), [token for chunk in session.decode(16) for token in chunk]))
    assert runs[0] == runs[1]
    found = divergence(want[None], logits[None])[0]
    print(f"4,096 ids, {prefill}: KL from token by token {found:.3e}")
    assert found <= 2e-4
    assert runs[0][1][0] == first
