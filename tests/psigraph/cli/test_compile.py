"""`psigraph compile` and `psigraph inspect`: what lies in the folder, and that it is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_model import Q4, changed

from psigraph.build import fuse, open_model
from psigraph.cli import run
from psigraph.codegen.device import device_headers
from psigraph.codegen.emitters import EMITTERS
from psigraph.codegen.lower import PREFILL_ROWS, is_view
from psigraph.inspect import compilation
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime.synth.model import QUANTS, SIZES, synth_model, write_synth
from psigraph.runtime.synth.vocab import SMALLEST

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> Path:
    """The tiny model, compiled for two architectures."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSIGRAPH_CACHE_DIR", str(kernel_cache))
        assert run(["compile", str(Q4), "--arch", "sm_90a", "--arch", "sm_80", "--out", str(out)]) == 0
    return out


def test_the_folder_holds_every_stage(compiled: Path) -> None:
    program = json.loads((compiled / "program.json").read_text())
    assert program["schema"] == "psigraph.program.v2"
    assert [step["name"] for step in program["steps"]] == ["decode", "prefill"]
    for step, regime, folder in zip(
        program["steps"], (Regime.STEP, Regime.MANY), (compiled, compiled / "prefill"), strict=True
    ):
        names = ["input", *(entry.name for entry in PIPELINE if regime in entry.regimes)]
        assert sorted(path.name for path in (folder / "ir").iterdir()) == [
            f"{number:02}-{name}.txt" for number, name in enumerate(names)
        ]
        passes = program["passes" if step["name"] == "decode" else "prefill_passes"]
        assert [entry["name"] for entry in passes] == names[1:]
        with open_model(Q4) as model:
            fused = fuse(model.graph(rows=step["rows"]), regime=regime)[0]
        assert parse_graph((folder / "fused.txt").read_text()) == fused
        assert (folder / "fused.dot").read_text().startswith("digraph")
        assert json.loads((folder / "fused.json").read_text())["nodes"]
        assert step["regime"] == str(regime)
        assert [launch["nodes"] for launch in step["launches"]] == [
            [out.name for out in node.outs] for node in fused.nodes if not is_view(node)
        ]
        prefix = "prefill_" if regime is Regime.MANY else ""
        assert all(launch["kernel"].startswith(prefix) for launch in step["launches"])
        assert set(program["kernels"]) >= {launch["kernel"] for launch in step["launches"]}
    assert [step["rows"] for step in program["steps"]] == [1, PREFILL_ROWS]
    for arch, folder in (("sm_90a", compiled / "kernels"), ("sm_80", compiled / "kernels" / "sm_80")):
        texts = {path.stem for path in folder.glob("*.cu")}
        cubins = list((compiled / "cubins" / arch).iterdir())
        assert {path.stem for path in cubins} == texts
        assert all(path.read_bytes().startswith(b"\x7fELF") for path in cubins)
        assert {path.name: path.read_text() for path in folder.glob("*.cuh")} == device_headers()
    other = json.loads((compiled / "program.sm_80.json").read_text())
    assert (program["arch"], other["arch"]) == ("sm_90a", "sm_80")
    assert all(found["spill_bytes"] == 0 for found in (*program["resources"].values(), *other["resources"].values()))
    assert not [path for path in compiled.parent.iterdir() if path != compiled]


def test_kernel_texts_are_for_people(compiled: Path) -> None:
    text = (compiled / "kernels" / "rope_attention.cu").read_text()
    assert "qwen3.yaml:" in text.partition("extern")[0]


def test_a_size_needs_no_file_and_is_what_synth_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_synth(tmp_path / "m.gguf", "0.6b", "q5_k_m", 1, layers=3, vocab=SMALLEST)
    metadata, tensors = synth_model("0.6b", "q5_k_m", layers=3)
    with open_model(path) as model:
        found = {name: (info.dtype, info.shape) for name, info in model.file.tensors.items()}
        assert {key: model.file.metadata[key] for key in metadata if key != "general.name"} == pytest.approx(
            {key: value for key, value in metadata.items() if key != "general.name"}
        )
    embedding = found.pop("token_embd.weight")
    assert tensors.pop("token_embd.weight") == (embedding[0], (151_936, embedding[1][1]))
    assert found == tensors
    assert run(["compile", "--size", "0.6B", "--quant", "Q8_0", "--arch", "sm_90a"]) == 0
    shown = capsys.readouterr().out
    assert "142 launches a token, 5 a layer" in shown
    chunk = shown.partition("sm_90a, 132 multiprocessors, a prompt's chunk")[2]
    for part in ("prefill_matvec_swiglu", "bytes a chunk", "launches a chunk, 8 a layer"):
        assert part in chunk
    assert "halve_activations" in shown.partition("a prompt's chunk")[2]
    assert "repack_q8_0" in shown


def test_a_second_run_replaces_the_first_and_a_failed_one_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["compile", str(Q4), "--arch", "sm_90a", "--out", str(out)]
    assert run(given) == 0
    assert run([*given, "--disable-pass", "fuse_swiglu"]) == 0
    program = (out / "program.json").read_text()
    for passes in ("passes", "prefill_passes"):
        assert [step["name"] for step in json.loads(program)[passes] if step["disabled"]] == ["fuse_swiglu"]
    for folder in (out, out / "prefill"):
        assert "matvec_swiglu" not in (folder / "fused.txt").read_text()

    written = compilation._write

    def full(path: Path, text: str) -> None:
        if path.suffix == ".cu":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, text)

    monkeypatch.setattr(compilation, "_write", full)
    capsys.readouterr()
    assert run(given) == 10
    assert capsys.readouterr().err == f"psigraph: --out {out}: cannot be written: No space left on device\n"
    assert (out / "program.json").read_text() == program
    assert list(tmp_path.iterdir()) == [out]
    assert run([*given[:-1], str(tmp_path / "new")]) == 10
    assert list(tmp_path.iterdir()) == [out]

    def interrupted(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compilation, "_write", interrupted)
    assert run(given) == 130
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ([], 2, "MODEL.gguf or --size"),
        ([str(Q4), "--size", "1.7b", "--quant", "q8_0"], 2, "MODEL.gguf or --size"),
        (["--size", "1.7b"], 2, "--size and --quant go together"),
        (["--size", "9b", "--quant", "q8_0"], 2, "0.6b, 1.7b, 4b, 8b"),
        (["--size", "1.7b", "--quant", "q3"], 2, "q4_k_m, q5_k_m, q8_0, f16"),
        (["--size", "1.7b", "--quant", "iq3_m"], 4, "no kernel reads iq3_s"),
        ([str(Q4), "--arch", "sm_90"], 2, "sm_90a"),
        ([str(Q4), "--arch", "host"], 2, "sm_80"),
        ([str(Q4), "--disable-pass", "quantize_activations"], 2, "kernels need"),
        ([str(Q4), "--ctx", "2049"], 2, "1 to 2048"),
        (["absent.gguf"], 3, "no such file"),
        (["."], 3, "not a regular file"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", *arguments, "--out", str(tmp_path / "out")]) == code
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert named in shown
    assert not list(tmp_path.iterdir())


def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Q4.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-100])
    split = tmp_path / "m-00001-of-00002.gguf"
    split.write_bytes(whole)
    cases = {
        cut: (3, "truncated"),
        split: (3, "m-00002-of-00002.gguf"),
        changed(tmp_path / "a", b"\x05\0\0\0\0\0\0\0qwen3", b"\x05\0\0\0\0\0\0\0llama"): (4, "general.architecture"),
        changed(tmp_path / "t", b"blk.7.ffn_up.weight", b"blk.7.ffn_xp.weight"): (3, "blk.7.ffn_up.weight"),
    }
    for path, (code, named) in cases.items():
        for command in ("compile", "inspect"):
            assert run([command, str(path)]) == code
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            assert named in shown


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", tmp_path):
        assert run(["compile", str(Q4), "--out", str(out)]) == 10
        assert f"--out {out}" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


STAGES = (
    ["--stage", "model"],
    ["--stage", "fused"],
    ["--stage", "fused", "--layer", "2", "--format", "json"],
    ["--stage", "program"],
    ["--stage", "program", "--layer", "7"],
    ["--stage", "prompt", "--layer", "0"],
    ["--step", "prefill", "--stage", "model", "--layer", "1"],
    ["--step", "prefill", "--after", "halve_activations", "--format", "json"],
    ["--step", "prefill", "--diff", "drop_unused"],
    ["--step", "prefill", "--stage", "program"],
    ["--step", "prefill", "--stage", "program", "--layer", "0"],
    ["--step", "decode", "--stage", "program"],
    ["--kernel", "prefill_matvec"],
    ["--kernel", "prefill_attention"],
    ["--kernel", "prefill_attention", "--format", "json", "--layer", "1"],
    ["--after", "fuse_attention", "--format", "dot"],
    ["--diff", "fuse_swiglu", "--layer", "0"],
    ["--kernel", "rope_attention"],
    ["--kernel", "embed_norm", "--format", "json"],
    ["--layer", "0"],
)


@pytest.mark.parametrize("arguments", STAGES, ids=" ".join)
def test_a_folder_shows_what_the_model_shows(
    arguments: list[str], compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(compiled), *arguments]) == 0
    of_folder = capsys.readouterr().out
    assert run(["inspect", str(Q4), *arguments]) == 0
    assert capsys.readouterr().out == of_folder
    assert of_folder.strip()


@pytest.mark.parametrize("kernel", ["rope_attention", "prefill_attention"])
def test_a_kernels_record_has_its_launches_of_the_layer(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["inspect", str(Q4), "--kernel", kernel]
    assert run([*shown, "--format", "json"]) == 0
    everywhere = json.loads(capsys.readouterr().out)["launches"]
    # A prompt needs no attention of the last layer.
    layers = list(range(8 if kernel == "rope_attention" else 7))
    assert [launch["layer"] for launch in everywhere] == layers
    assert run([*shown, "--format", "json", "--layer", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["launches"] == [everywhere[2]]
    assert run([*shown, "--layer", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#include")
    # The text is every layer's; what is this layer's own stands behind it.
    assert f"// layer 2: computes %{everywhere[2]['nodes'][0]}" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("kernel", "layer", "says"),
    [
        ("prefill_attention", 7, "is launched in layer 0, 1, 2, 3, 4, 5, 6, not there"),
        ("embed_norm", 0, "outside of the"),
    ],
)
def test_a_layer_that_does_not_launch_the_kernel(
    kernel: str, layer: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(Q4), "--kernel", kernel, "--layer", str(layer)]) == 2
    shown = capsys.readouterr()
    assert (shown.out, f"--layer {layer}: {kernel} " in shown.err, says in shown.err) == ("", True, True)


def test_a_diff_shows_what_the_pass_did_and_only_that(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(compiled), "--diff", "fuse_swiglu", "--layer", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("+ ")).startswith("+  %L0.act: f32[1,768] = matvec_swiglu(")
    assert sum(line.startswith("- ") for line in lines) == 3
    assert run(["inspect", str(compiled), "--diff", "fuse_choice", "--layer", "0"]) == 0
    assert capsys.readouterr().out == "fuse_choice changed nothing here\n"


def test_a_prompts_passes_and_launches_are_shown_as_those_of_a_step(
    compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> str:
        assert run(["inspect", str(compiled), *arguments]) == 0
        return capsys.readouterr().out

    graph = shown("--stage", "prompt", "--layer", "0")
    assert graph == shown("--step", "prefill", "--stage", "fused", "--layer", "0")
    assert f"f32[{PREFILL_ROWS},256]" in graph
    lines = shown("--step", "prefill", "--diff", "fuse_swiglu", "--layer", "0").splitlines()
    assert any(line.startswith(f"+  %L0.act: f32[{PREFILL_ROWS},768] = matvec_swiglu(") for line in lines)
    program = shown("--step", "prefill", "--stage", "program")
    assert " launches a chunk, " in program
    assert "prefill_attention" in program
    assert "rope_attention" not in program
    decode = shown("--stage", "program")
    assert "42 launches a token, 5 a layer" in decode
    assert "prefill_" not in decode
    overview = shown("--step", "prefill")
    assert "drop_choice" in overview
    assert "prefill_attention" in overview
    assert "prefill_" not in shown()


def test_where_a_prompt_has_no_kernels_its_graphs_are_shown_and_its_launches_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(EMITTERS, ("attention", Regime.MANY))
    assert run(["inspect", str(Q4), "--step", "prefill", "--stage", "fused", "--layer", "0"]) == 0
    assert "attention(" in capsys.readouterr().out
    assert run(["inspect", str(Q4), "--stage", "program"]) == 0
    assert "launches a token" in capsys.readouterr().out
    assert run(["inspect", str(Q4), "--step", "prefill", "--stage", "program"]) == 2
    why = "prompts go in token by token: op attention has no kernel for many rows"
    assert f"--step prefill: {why}" in capsys.readouterr().err


def test_the_overview(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(Q4)]) == 0
    shown = capsys.readouterr().out
    for part in ("8,919,296 parameters", "Q4_K_M: 48 q4_k, 9 q6_k", "head_dim 128", "merge_qkv", "rope_attention"):
        assert part in shown
    assert "f16, 8,192 bytes a position in all layers" in shown
    ends = "4095 '<|im_end|>' (tokenizer.ggml.eos_token_id, its text, the chat template ends turns with it)"
    assert f"end tokens     {ends}; 4093 '<|endoftext|>' (its text)\n" in shown
    assert "and 8,192 bytes of cache" in shown
    assert run(["inspect", str(compiled)]) == 0
    assert "sm_90a" in capsys.readouterr().out


def test_the_type_of_the_cache_shows_at_every_stage(
    compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["inspect", str(Q4), "--kv-type", "q8"]
    assert run(given) == 0
    shown = capsys.readouterr().out
    assert "q8, 4,352 bytes a position in all layers" in shown
    assert "and 4,352 bytes of cache" in shown
    for stage in ("model", "fused", "prompt"):
        assert run([*given, "--stage", stage, "--layer", "0"]) == 0
        shown = capsys.readouterr().out
        assert "q8[1,2,2048,128]" in shown
        assert "f16[1,2,2048,128]" not in shown
    assert run([*given, "--kernel", "rope_attention"]) == 0
    assert "typedef Q8<128> Cache;" in capsys.readouterr().out
    assert run(["inspect", str(compiled), "--kv-type", "q8"]) == 2
    assert "is compiled already; give the model file instead" in capsys.readouterr().err
    out = tmp_path / "q8"
    assert run(["compile", str(Q4), "--arch", "sm_90a", "--ctx", "64", "--kv-type", "q8", "--out", str(out)]) == 0
    assert "q8[1,2,64,128]" in (out / "fused.txt").read_text()
    record = json.loads((out / "program.json").read_text())
    assert {b["nbytes"] for b in record["buffers"] if b["dtype"] == "q8"} == {2 * 64 * 136}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stage", "fused", "--after", "merge_qkv"], "--stage and --after"),
        (["--after", "nope"], "merge_qkv"),
        (["--diff", "input"], "merge_qkv"),
        (["--kernel", "nope"], "rope_attention"),
        (["--layer", "8"], "layers 0 to 7"),
        (["--stage", "program", "--format", "dot"], "only graphs"),
        (["--diff", "merge_qkv", "--format", "json"], "--format json"),
        (["--stage", "kernel"], "--stage"),
        (["--kv-type", "q4"], "--kv-type"),
        (["--step", "few"], "--step"),
        (["--step", "decode", "--stage", "prompt"], "--stage prompt is a stage of --step prefill"),
        (["--step", "prefill", "--after", "fuse_attention"], "the passes are drop_choice, merge_qkv"),
        (["--diff", "halve_activations"], "the passes are merge_qkv"),
    ],
)
def test_inspect_refuses(arguments: list[str], named: str, compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (Q4, compiled):
        assert run(["inspect", str(model), *arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert named in shown.err


@pytest.mark.parametrize(
    "harm",
    [
        "nothing left", "no list", "no program", "torn program", "no graph", "another graph", "no kernel", "a folder",
        "not text", "another version", "no JSON", "a list", "deep", "no steps",
    ],
)  # fmt: skip
def test_inspect_refuses_folders_that_are_not_whole(
    harm: str, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One code for all of it: that of a model file that is no whole one."""
    folder = tmp_path / "out"
    shutil.copytree(compiled, folder)
    graph, program, kernel = folder / "ir" / "00-input.txt", folder / "program.json", folder / "kernels/embed_norm.cu"
    sums = folder / "SHA256SUMS"

    def listed(path: Path, now: str) -> None:
        """Another text, whose digest is that of the list."""
        was = path.read_text()
        path.write_text(now)
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in (was, now)]
        sums.write_text(sums.read_text().replace(*digests))

    {
        "nothing left": lambda: (shutil.rmtree(folder), (folder / "ir").mkdir(parents=True)),
        "no list": sums.unlink,
        "no program": program.unlink,
        "torn program": lambda: program.write_text("{"),
        "no graph": graph.unlink,
        "another graph": lambda: graph.write_text("func nonsense"),
        "no kernel": kernel.unlink,
        "a folder": lambda: (graph.unlink(), graph.mkdir()),
        "not text": lambda: kernel.write_bytes(b"\xff\xfe"),
        "another version": lambda: listed(program, '{"schema": "psigraph.program.v0"}'),
        "no JSON": lambda: listed(program, "{"),
        "a list": lambda: listed(program, "[]"),
        "deep": lambda: listed(program, "[" * 100_000),
        "no steps": lambda: listed(program, program.read_text().replace('"steps"', '"parts"', 1)),
    }[harm]()
    wanted = ["--kernel", "embed_norm"] if harm in ("no kernel", "not text") else ["--stage", "model"]
    assert run(["inspect", str(folder), *wanted]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"psigraph: {folder}")
    assert shown.err.count("\n") == 1


def test_inspect_shows_every_architecture_of_a_folder(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for arch in ("", "sm_90a", "sm_80"):
        assert run(["inspect", str(compiled), *(["--arch", arch] if arch else [])]) == 0
        shown[arch] = capsys.readouterr().out
    assert "sm_90a; --arch shows sm_80" in shown[""]
    assert shown[""] == shown["sm_90a"]
    assert "\nsm_80, " in shown["sm_80"]
    assert run(["inspect", str(compiled), "--arch", "sm_80", "--kernel", "rope_attention"]) == 0
    assert capsys.readouterr().out == (compiled / "kernels" / "sm_80" / "rope_attention.cu").read_text()
    assert run(["inspect", str(compiled), "--arch", "sm_89"]) == 2
    assert "is compiled for sm_90a, sm_80" in capsys.readouterr().err


@pytest.mark.parametrize("mine", ["notes.txt", "kernels/mine.cu", "program.json", "empty", "link"])
def test_what_compile_did_not_write_is_not_deleted(
    mine: str, compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a note in its folder, not a kernel that was changed by hand, not a folder that holds a program.json."""
    out = tmp_path / "out"
    shutil.copytree(compiled, out)
    path = out / mine
    if mine == "program.json":
        path.write_text('{"schema": "of something else"}')
    elif mine == "empty":
        path.mkdir()
    elif mine == "link":
        path.symlink_to(compiled)
    else:
        path.write_text("mine")
    assert run(["compile", str(Q4), "--out", str(out)]) == 10
    assert f"holds {mine}, which psigraph compile did not write" in capsys.readouterr().err
    assert os.path.lexists(path)
    if mine == "notes.txt":
        path.unlink()
        (out / "fused.txt").unlink()
        assert run(["compile", str(Q4), "--arch", "sm_90a", "--out", str(out)]) == 0  # a half-deleted one is replaced


def test_help_lists_every_mix(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "--help"]) == 0
    shown = capsys.readouterr().out
    assert not [name for name in (*QUANTS, *SIZES) if name not in shown]
