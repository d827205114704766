"""Every rule of the verifier refuses the graph that breaks it, and shows where."""

from dataclasses import replace

import pytest
from small_models import Small

from psigraph.ir.errors import SpecError
from psigraph.ir.graph import Param, TensorType, Value
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import takeovers, verify
from psigraph.passes.pipeline import run_pipeline

TEXT = """graph tail(
  weight %w: q4_k[256,256],
  weight %n: f32[256],
  constant %ends: i32[8],
  state %x: f32[3,256],
  state %row: f32[3,2,128],
  state %cache: f16[2,2,16,128],
  state %log: i32[2,16],
  state %positions: i32[3],
  state %sequences: i32[3]
) {
  %h: f32[3,256] = rms_norm(%x, %n) {eps=1e-06}   # m.yaml:7
  %y: f32[3,256] = matvec(%h, %w)   # m.yaml:8
  %c2: f16[2,2,16,128] = cache_append(%cache, %row, %positions, %sequences)   # m.yaml:9
  %p2: i32[3] = advance(%positions)   # m.yaml:10
  return x=%y, cache=%c2, positions=%p2
}
"""


def test_sound_graphs_pass():
    verify(parse_graph(TEXT))
    graph = Small(layers=3).graph("logits")
    verify(graph)
    verify(run_pipeline(graph)[0], lowered=True)


@pytest.mark.parametrize(
    ("old", "new", "message", "marked"),
    [
        ("matvec(%h, %w)", "matvek(%h, %w)", "no such op (did you mean matvec?)", "matvek"),
        ("matvec(%h, %w)", "matvec(%h)", "takes at least 2 operands, not 1", ""),
        ("rms_norm(%x, %n)", "rms_norm(%x)", "takes 2 operands (x, weight), not 1", ""),
        (" {eps=1e-06}", "", "needs the attribute eps", ""),
        ("{eps=1e-06}", "{eps=1e-06, theta=1.0}", "has no attribute theta", ""),
        ("{eps=1e-06}", "{eps=1}", "wants eps as float, not 1", ""),
        ("weight %w: q4_k[256,256]", "weight %w: q4_k[256,512]", "w0 is q4_k[256,512], wanted", "%w"),
        ("weight %w: q4_k[256,256]", "weight %w: i8x2[256,256]", "w0 is i8x2[256,256], wanted", "%w"),
        ("weight %n: f32[256]", "weight %n: f32[128]", "weight is f32[128], wanted f32[256]", "%n"),
        ("%y: f32[3,256] =", "%y: f32[3,128] =", "%y is f32[3,128], but the op makes f32[3,256]", ""),
        ("%y: f32[3,256] =", "%y: i8x2[3,256] =", "but the op makes f32[3,256]", ""),
        ("%h: f32[3,256] = rms_norm(%x", "%x: f32[3,256] = rms_norm(%x", "%x is defined twice", ""),
        ("%y: f32[3,256] = m", "%y: f32[3,256], %z: f32[3,256] = m", "has 1 results, not 2", ""),
    ],
)
def test_bad_nodes(old, new, message, marked):
    text = TEXT.replace(old, new)
    if "%h" not in text.split("rms_norm")[0]:
        text = text.replace("matvec(%h", "matvec(%x")
    with pytest.raises(SpecError, match=r"m\.yaml:[78]: ") as caught:
        verify(parse_graph(text))
    first, line, marks = str(caught.value).split("\n")
    assert message in first
    found = line[marks.index("^") : marks.rindex("^") + 1]
    assert found == (marked or line.strip())


def test_order_matters():
    graph = parse_graph(TEXT)
    with pytest.raises(SpecError, match="%h is not defined before it is used"):
        verify(replace(graph, nodes=graph.nodes[::-1]))


def test_a_use_has_the_type_of_its_definition():
    graph = parse_graph(TEXT)
    other = replace(graph.nodes[1], ins=(Value("h", TensorType("i8x2", (3, 256))), graph.nodes[1].ins[1]))
    with pytest.raises(SpecError, match=r"%h is read as i8x2\[3,256\] but was defined as f32\[3,256\]"):
        verify(replace(graph, nodes=(graph.nodes[0], other, *graph.nodes[2:])))


def test_a_cache_is_not_read_once_it_was_taken_over():
    line = "  %c2: f16[2,2,16,128] = cache_append(%cache, %row, %positions, %sequences)   # m.yaml:9\n"
    graph = parse_graph(TEXT.replace(line, line + line.replace("c2", "c3").replace(":9", ":12")))
    with pytest.raises(SpecError, match=r"m.yaml:12: .*%cache was taken over by %c2 already"):
        verify(graph)
    assert takeovers(graph.nodes[2]) == {"cache": "c2"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return x=%y, cache=%c2", "return x=%y, x=%y, cache=%c2", "x is returned twice"),
        ("return x=%y", "return positions=%y", "positions is i32[3] and cannot take f32[3,256]"),
        ("return x=%y", "return n=%h", "n is a weight and keeps its value"),
        ("return x=%y", "return ends=%ends", "ends is a constant and keeps its value"),
        ("state %x: f32[3,256]", "state %x: f64[3,256]", "unknown element type"),
        ("state %row: f32[3,2,128]", "state %row: f32[3,0,128]", "empty shape"),
        ("state %row: f32[3,2,128]", "state %x: f32[3,256]", "defined twice"),
    ],
)
def test_bad_parameters_and_results(old, new, message):
    graph_text = TEXT.replace(old, new)
    if "%row: f32[3,2,128]" not in graph_text:
        graph_text = "\n".join(line for line in graph_text.split("\n") if "%c2: " not in line)
        graph_text = graph_text.replace("cache=%c2, ", "")
    with pytest.raises(SpecError) as caught:
        verify(parse_graph(graph_text))
    assert message in str(caught.value)
    assert "^" in str(caught.value)


def test_parameter_kinds():
    graph = parse_graph(TEXT)
    odd = (Param("input", graph.params[0].value), *graph.params[1:])
    with pytest.raises(SpecError, match="input is no kind of parameter"):
        verify(replace(graph, params=odd))


def test_lowered_graphs_pair_weights_with_their_activations():
    with pytest.raises(SpecError, match="q4_k weights want a i8x2 activation, not f32"):
        verify(parse_graph(TEXT), lowered=True)
    quantized = TEXT.replace("q4_k", "f16").replace("%h: f32", "%h: i8x2")
    verify(parse_graph(quantized))
    with pytest.raises(SpecError, match="f16 weights want a f32 activation, not i8x2"):
        verify(parse_graph(quantized), lowered=True)


def test_only_rows_of_whole_groups_are_quantized():
    text = """graph g(state %x: f32[3,24], state %y: f32[24]) {
      %z: i8x2[3,24] = mul(%x, %y)
      return z=%z
    }"""
    with pytest.raises(SpecError, match=r"%z is i8x2\[3,24\], but the op makes f32\[3,24\]"):
        verify(parse_graph(text))
    verify(parse_graph(text.replace("24", "32")))


def test_halves_stand_where_floats_may():
    """How rows lie in memory is no matter of the op; counters are no floats."""
    text = """graph g(weight %w: f32[4,4], state %x: f32[3,4], state %positions: i32[3]) {
      %a: f16[3,4] = matvec(%x, %w)
      %p: i32[3] = advance(%positions)
      return a=%a, positions=%p
    }"""
    verify(parse_graph(text))
    with pytest.raises(SpecError, match=r"%p is f16\[3\], but the op makes i32\[3\]"):
        verify(parse_graph(text.replace("%p: i32[3]", "%p: f16[3]")))
