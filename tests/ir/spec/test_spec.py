"""Model specs: Qwen3 bound to good and bad files, a second architecture, and errors with lines."""

import numpy as np
import pytest
from small_models import QWEN3, SPEC_PATH, Small, assert_same_steps, decode, random_weights

from psigraph.ir.errors import ModelFileError, PsigraphError, SpecError, UnsupportedModelError, UsageError
from psigraph.ir.graph import TensorType
from psigraph.ir.spec.loader import available_specs, load_spec
from psigraph.ir.verify import verify
from psigraph.passes.pipeline import run_pipeline

TEXT = SPEC_PATH.read_text(encoding="utf-8")


def bind(small=Small(), ctx=16, keys=None, tensors=None, **options):  # noqa: B008 (frozen)
    """Binds with changes: None removes a key or tensor."""
    metadata = {**small.metadata(), **(keys or {})}
    types = {**small.tensors(), **(tensors or {})}
    return QWEN3.bind(
        {key: value for key, value in metadata.items() if value is not None},
        {name: type_ for name, type_ in types.items() if type_ is not None},
        ctx,
        **options,
    )


def test_binding_chooses_the_type_of_the_caches():
    graph = QWEN3.graph(bind(kv_type="q8"))
    verify(graph)
    types = {str(param.type) for param in graph.params if "_cache." in param.name}
    assert types == {"q8[1,2,16,128]"}
    fused, _ = run_pipeline(graph)
    verify(fused, lowered=True)
    assert fused.param("v_cache.0").type.dtype == "q8"
    with pytest.raises(UsageError, match="--kv-type q4: choose one of f16, q8"):
        bind(kv_type="q4")


def test_names_and_results_of_the_graph():
    graph = Small(layers=2).graph("logits")
    params = {param.name: param for param in graph.params}
    assert params["blk.1.ffn_down.weight"].kind == "weight"
    assert str(params["k_cache.1"].type) == "f16[1,2,16,128]"
    assert str(params["log"].type) == "i32[1,16]"
    assert params["end_tokens"].kind == "constant"
    states = ["tokens", "positions", "stop", "log", "k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1"]
    assert [name for name, _ in graph.results] == [*states, "logits"]
    producers = graph.producers()
    assert producers["L1.q"].op == "matvec"
    assert producers["L1.h.2"].ins[0].name == "L1.x"
    verify(graph)


def test_a_graph_has_as_many_rows_and_sequences_as_are_asked_for():
    graph = Small(sequences=4).graph("logits", rows=7)
    verify(graph)
    types = {param.name: str(param.type) for param in graph.params}
    assert [types[name] for name in ("tokens", "positions", "sequences")] == ["i32[7]"] * 3
    assert (types["stop"], types["log"], types["v_cache.0"]) == ("i32[4]", "i32[4,16]", "f16[4,2,16,128]")
    assert {str(value.type) for name, value in graph.results if name == "logits"} == {"f32[7,48]"}


def test_every_node_names_its_line():
    lines = TEXT.split("\n")
    for node in Small(layers=2).graph().nodes:
        (origin,) = node.origin
        assert origin.file == "qwen3.yaml"
        assert f"= {node.op}(" in lines[origin.line - 1]


@pytest.mark.parametrize("tied", [True, False])
def test_head(tied):
    graph = Small(tied=tied).graph()
    head = next(node for node in graph.nodes if node.outs[0].name == "logits")
    assert head.ins[1].name == ("token_embd.weight" if tied else "output.weight")


def test_context():
    assert bind(ctx=None).sizes["context"] == 64
    assert bind(ctx=None, keys={"qwen3.context_length": 40960}).sizes["context"] == 4096
    assert bind(ctx=64).context_limit == 64
    for ctx in (0, 65):
        with pytest.raises(UsageError, match="the model allows 1 to 64"):
            bind(ctx=ctx)


def test_numpy_numbers_are_numbers():
    assert bind(keys={"qwen3.embedding_length": np.uint32(256), "qwen3.rope.freq_base": np.float32(1e6)}).layers == 1


def test_absent_optional_keys():
    keys = {"qwen3.attention.head_count_kv": None, "qwen3.attention.value_length": None}
    assert bind(Small(heads=2, kv_heads=2), keys=keys).sizes["kv_heads"] == 2


VECTOR = TensorType("f32", (256,))


@pytest.mark.parametrize(
    ("keys", "tensors", "kind", "message"),
    [
        ({"general.architecture": "qwen2"}, {}, UnsupportedModelError, "'qwen2' is not supported: its q, k and v have"),
        ({"general.architecture": "qwen3moe"}, {}, UnsupportedModelError, "mixture of experts"),
        ({"general.architecture": "qwen35"}, {}, UnsupportedModelError, "linear attention"),
        ({"general.architecture": "qwen3next"}, {}, UnsupportedModelError, "linear attention"),
        ({"general.architecture": "qwen3vl"}, {}, UnsupportedModelError, "for images"),
        ({"general.architecture": "llama"}, {}, UnsupportedModelError, "'llama' is not supported: qwen3.yaml is for"),
        ({"general.architecture": None}, {}, ModelFileError, "general.architecture: the key is missing"),
        ({"qwen3.block_count": None}, {}, ModelFileError, "qwen3.block_count: the key is missing"),
        ({"qwen3.block_count": 0}, {}, ModelFileError, "qwen3.block_count: is 0, wanted a whole number from 1 to 1024"),
        ({"qwen3.block_count": 2}, {}, ModelFileError, "blk.1.attn_norm.weight: the tensor is missing"),
        ({"qwen3.embedding_length": 2.5}, {}, ModelFileError, "qwen3.embedding_length: is 2.5, wanted a whole"),
        ({"qwen3.embedding_length": True}, {}, ModelFileError, "qwen3.embedding_length: is True"),
        ({"qwen3.embedding_length": "x" * 999}, {}, ModelFileError, "qwen3.embedding_length: is 'xxx"),
        ({"qwen3.attention.head_count": np.arange(3)}, {}, ModelFileError, "is a list (ndarray), wanted a whole"),
        ({"qwen3.rope.freq_base": float("nan")}, {}, ModelFileError, "qwen3.rope.freq_base: is nan"),
        ({"qwen3.attention.head_count": 3}, {}, UnsupportedModelError, "(heads is 3, kv_heads is 2): every key/value"),
        ({"qwen3.attention.value_length": 64}, {}, UnsupportedModelError, "keys and values share one head size"),
        ({"qwen3.rope.dimension_count": 64}, {}, UnsupportedModelError, "the whole head is rotated"),
        ({"qwen3.rope.scaling.type": "longrope"}, {}, UnsupportedModelError,
         "qwen3.rope.scaling.type is 'longrope', psigraph computes only none or linear or yarn"),
        ({"qwen3.rope.scaling.type": 2}, {}, UnsupportedModelError, "qwen3.rope.scaling.type is 2"),
        ({"qwen3.rope.scaling.type": "linear"}, {}, ModelFileError, "qwen3.rope.scaling.factor: the key is missing"),
        ({"qwen3.rope.scaling.attn_factor": 1.5}, {}, UnsupportedModelError, "qwen3.rope.scaling.attn_factor is 1.5"),
        ({"qwen3.rope.scaling.factor": 4.0}, {}, UnsupportedModelError, "qwen3.rope.scaling.factor is 4.0"),
        ({"qwen3.rope.scaling.factor": np.ones(3)}, {}, UnsupportedModelError, "qwen3.rope.scaling.factor is a list"),
        ({}, {"token_embd.weight": None}, ModelFileError, "token_embd.weight: the tensor is missing"),
        ({}, {"blk.0.attn_q.weight": None}, ModelFileError, "blk.0.attn_q.weight: the tensor is missing"),
        ({}, {"blk.0.attn_q.weight": TensorType("q4_k", (256, 512))}, ModelFileError,
         "blk.0.attn_q.weight: has the shape [256, 512], wanted [512, 256]"),
        ({}, {"blk.0.attn_q.weight": TensorType("iq4_xs", (512, 256))}, UnsupportedModelError,
         "blk.0.attn_q.weight: no kernel reads iq4_xs here (known: q4_k, q5_k, q6_k, q8_0, f16, bf16, f32)"),
        ({}, {"output_norm.weight": TensorType("f16", (256,))}, UnsupportedModelError,
         "output_norm.weight: no kernel reads f16 here (known: f32)"),
        ({}, {"output.weight": TensorType("f16", (40, 256))}, ModelFileError, "output.weight: has the shape [40, 256]"),
        ({}, {"blk.0.attn_q.bias": VECTOR}, UnsupportedModelError, "blk.0.attn_q.bias: the qwen3 step does not use"),
        ({}, {"blk.1.attn_norm.weight": VECTOR}, UnsupportedModelError, "blk.1.attn_norm.weight: the qwen3 step"),
    ],
)  # fmt: skip
def test_bad_files(keys, tensors, kind, message):
    with pytest.raises(PsigraphError) as caught:
        bind(keys=keys, tensors=tensors)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_whole_blocks():
    small = Small(hidden=96, heads=2, kv_heads=2, head_dim=48, ffn=96, dtype="q8_0")
    assert bind(small).sizes["hidden"] == 96
    with pytest.raises(ModelFileError, match=r"token_embd\.weight: rows of 96 are no whole blocks of 256"):
        bind(small, tensors={"token_embd.weight": TensorType("q4_k", (48, 96))})


def test_positions_that_are_not_rescaled_may_say_so():
    bind(keys={"qwen3.rope.scaling.type": "none", "qwen3.rope.scaling.factor": 1.0})


def test_unknown_output():
    with pytest.raises(UsageError, match="computes no output logit"):
        Small().graph("logit")
    with pytest.raises(UsageError, match="computes no output tokens"):
        Small().graph("tokens")


# A second architecture: a YAML file and nothing else.

LLAMA = """
architecture: small
sizes:
  layers:     {key: small.blocks, integer: 1..8}
  context:    {key: small.context, integer: 1..4096}
  hidden:     {key: small.width, integer: 1..4096}
  heads:      {key: small.heads, integer: 1..64}
  head_dim:   {value: hidden // heads}
  theta:      {key: small.theta, float: 1..1e9, otherwise: 10000.0}
  scale:      {value: head_dim ** -0.5}
  vocabulary: {rows: embedding, integer: 1..100000}
weights:
  embedding: embd [vocabulary, hidden]
  norm:      l{layer}.norm [hidden]
  qkv:       l{layer}.q [hidden, hidden]
  k:         l{layer}.k [hidden, hidden]
  v:         l{layer}.v [hidden, hidden]
  o:         l{layer}.o [hidden, hidden]
  gate:      l{layer}.gate [2 * hidden, hidden]
  up:        l{layer}.up [2 * hidden, hidden]
  down:      l{layer}.down [hidden, 2 * hidden]
state:
  tokens: i32[rows]
  positions: i32[rows]
  sequences: i32[rows]
  stop: i32[max_sequences]
  log: i32[max_sequences, context]
  keys.{layer}: f16[max_sequences, heads, context, head_dim]
  values.{layer}: f16[max_sequences, heads, context, head_dim]
constants:
  end_tokens: i32[8]
before: |
  %x = embed(%embedding, %tokens)
layer: |
  %h = rms_norm(%x, %norm) {eps=1e-05}
  %q = matvec(%h, %qkv)
  %ks = matvec(%h, %k)
  %vs = matvec(%h, %v)
  %q_heads = split_heads(%q) {heads=$heads}
  %k_heads = split_heads(%ks) {heads=$heads}
  %v_heads = split_heads(%vs) {heads=$heads}
  %q_rotated = rope(%q_heads, %positions) {theta=$theta}
  %k_rotated = rope(%k_heads, %positions) {theta=$theta}
  %keys = cache_append(%keys, %k_rotated, %positions, %sequences)
  %values = cache_append(%values, %v_heads, %positions, %sequences)
  %a = attention(%q_rotated, %keys, %values, %positions, %sequences) {scale=$scale}
  %a = merge_heads(%a)
  %o_out = matvec(%a, %o)
  %x = add(%o_out, %x)
  # No norm here: the products read the residual itself.
  %g = matvec(%x, %gate)
  %u = matvec(%x, %up)
  %act = swiglu(%g, %u)
  %d = matvec(%act, %down)
  %x = add(%x, %d)
after: |
  %logits = matvec(%x, %embedding)
  %tokens = argmax(%logits)
  %log = record(%log, %tokens, %positions, %sequences)
  %stop = stop_on(%tokens, %end_tokens, %stop, %positions, %sequences)
  %positions = advance(%positions)
"""
HEADER = {"general.architecture": "small", "small.blocks": 2, "small.context": 16, "small.width": 64, "small.heads": 4}


@pytest.mark.parametrize("dtype", ["q8_0", "bf16"])
def test_a_second_architecture_is_a_yaml_file(tmp_path, dtype):
    (tmp_path / "small.yaml").write_text(LLAMA)
    (tmp_path / "policy.yaml").write_text("rules: []\n")
    assert available_specs(tmp_path) == {"small": tmp_path / "small.yaml"}
    spec = load_spec(tmp_path / "small.yaml")
    tensors = {"embd": TensorType(dtype, (40, 64))}
    for layer in range(2):
        tensors |= {f"l{layer}.{name}": TensorType(dtype, (64, 64)) for name in "qkvo"}
        tensors |= {f"l{layer}.{name}": TensorType(dtype, (128, 64)) for name in ("gate", "up")}
        tensors |= {f"l{layer}.norm": VECTOR, f"l{layer}.down": TensorType(dtype, (64, 128))}
        tensors[f"l{layer}.norm"] = TensorType("f32", (64,))
    graph = spec.graph(spec.bind(HEADER, tensors, None), ("logits",))
    fused, reports = run_pipeline(graph)
    matches = {report.name: report.matches for report in reports}
    # Without norms on q and k the single ops between the product and the cache stay.
    assert matches["fuse_rope_append"] == matches["fuse_attention"] == 0
    assert (matches["merge_qkv"], matches["fuse_swiglu"], matches["defer_norm"]) == (2, 2, 2)
    assert (matches["fuse_residual"], matches["fuse_choice"]) == (4, 1)
    weights = random_weights(graph)
    assert_same_steps(decode(graph, weights), decode(fused, weights, exact_activations=True))


def test_two_files_for_one_architecture(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(LLAMA)
    with pytest.raises(SpecError, match=r"b\.yaml:2: architecture: small is declared in a\.yaml already"):
        available_specs(tmp_path)


def test_the_models_folder():
    assert available_specs(SPEC_PATH.parent) == {"qwen3": SPEC_PATH}


def load_and_unroll(path):
    small = Small()
    spec = load_spec(path)
    spec.graph(spec.bind(small.metadata(), small.tensors(), 16))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("= rms_norm(%x, %attn", "= rms_nrm(%x, %attn", "%h = rms_", "no such op (did you mean rms_norm?)"),
        ("%k = matvec(%h,", "%k = matvec(%hh,", "%k = matvec(%hh", "%hh is not known here (did you mean h?)"),
        ("sizes: [factor, attn_factor]", "sizes: [factors]", "[factors]", "no size is called factors (did you"),
        ("    linear:\n      sizes:", "    linear:\n      size:", "    size: [", "no such field: size (known: sizes,"),
        ("head_dim ** -0.5", "factor ** -0.5", "  scale:", "no size is called factor here"),
        ("theta > 1:", "thera > 1:", "thera > 1", "no size is called thera here"),
        ("{theta=$theta,", "{theta=$thera,", "%q_rotated", "no size is called thera (did you mean theta?)"),
        ("{scale=$scale}", "", "%a_heads =", "attention needs the attribute scale"),
        ("{scale=$scale}", "{scale=$scale, sink=1}", "%a_heads =", "attention has no attribute sink"),
        ("{scale=$scale}", "{scale=$heads}", "%a_heads =", "attention wants scale as float, not"),
        ("%act = swiglu(%gate, %up)", "%act = swiglu(%gate)", "%act =", "swiglu takes 2 operands"),
        ("%down = matvec", "%down, %p = matvec", "%down, %p", "matvec has 1 results"),
        ("%down = matvec", "%ffn_down = matvec", "%ffn_down = m", "%ffn_down cannot be assigned"),
        ("%x = embed", "%x: f32[4] = embed", "%x: f32[4]", "%x takes no type here"),
        ("%x = embed(%token_embd, %tokens)", "%x = embed(%ffn_up, %tokens)", "%x = embed", "%ffn_up is not known here"),
        ("matvec(%a, %attn_output)", "matvec(%h, %attn_output)", "%o = matvec", "w0 is q4_k[256,512], wanted"),
        ("  %gate = matvec", "  %gate + matvec", "%gate + ", "cannot read '+'"),
        ("value: head_dim ** -0.5", "value: heads_dim ** -0.5", "scale: ", "no size is called heads_dim here"),
        ("integer: 1..1024", "integer: many", "  layers: ", "'many' is no range LOW..HIGH"),
        ("{rows: token_embd,", "{rows: tok,", "vocabulary: {", "no weight is called tok"),
        ("{value: head_dim ** -0.5}", "{value: 1, key: b}", "scale: ", "exactly one of key, rows and value"),
        ("{value: head_dim ** -0.5}", "{valu: 1}", "scale: ", "no such field: valu"),
        ("output.weight [vocabulary, hidden] or token_embd", "output.weight [hidden] or token_embd", " output: ",
         "token_embd is no weight of the same shape"),
        ("attn_norm.weight [hidden]", "attn_norm.weight hidden", "  attn_norm: ", "wanted `tensor.name [rows"),
        ("attn_norm.weight [hidden]", "attn_norm.weight [hid den]", "  attn_norm: ", "is no expression"),
        ("i32[max_sequences, context]", "i33[max_sequences, context]", "  log: ", "wanted `dtype[extent, ...]`"),
        ("before: |", "before: >", "before: >", "literal block"),
        ("\nstate:", "\nstates:", "  tokens: ", "states: no such part (did you mean state?)"),
        ("  %up = matvec(%h, %ffn_up)\n", "  %up = matvec(%h, %ffn_gate)\n", "  ffn_up: ", "ffn_up is never used"),
        ("v_cache.{layer}:", "v_{layer}_cache:", "v_{layer}_cache", "belongs at the end"),
        ("heads % kv_heads == 0:", "heads % kv_head == 0:", "heads % kv_head ", "no size is called kv_head here"),
    ],
)  # fmt: skip
def test_bad_specs_name_their_line(tmp_path, old, new, line, message):
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    path = tmp_path / "qwen3.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_and_unroll(path)
    assert message in str(caught.value)
    number = next(index for index, found in enumerate(text.split("\n"), 1) if line in found)
    assert str(caught.value).startswith(f"qwen3.yaml:{number}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.yaml: the file is empty"),
        ("a: [", "m.yaml:1: "),
        ("- a", "m.yaml:1: the document: wanted `key: value` lines"),
        ("architecture: a\narchitecture: b", "m.yaml:2: architecture: stands twice"),
        ("architecture: a", "sizes: is missing"),
    ],
)
def test_files_that_are_no_spec(tmp_path, text, message):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")
