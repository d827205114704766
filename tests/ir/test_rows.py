"""Every op of the table on its own example: types, rows that do not know of each other, and graphs of one node.

There is nothing to add here for a new op: its row has an example, and these tests run it.
"""

from dataclasses import replace

import numpy as np
import pytest
from op_examples import ROWS, example

from psigraph.ir.interpret import Interpreter
from psigraph.ir.op import TypeMismatch
from psigraph.ir.ops import OPS
from psigraph.ir.ops.attention import CACHES
from psigraph.ir.text import parse_graph, print_graph
from psigraph.ir.verify import verify

STATEFUL = [name for name, op in OPS.items() if "sequences" in op.operands]
ROW_COUNTS = (1, 3, 20)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_an_example_that_its_rule_accepts(name):
    op = OPS[name]
    assert op.example, f"{name}: its row in ir/ops has no example"
    for rows in ROW_COUNTS:
        types, attrs = op.example_of(rows)
        assert any(rows in type_.shape[:1] for type_ in types), f"{name}: no operand of its example has T rows"
        try:
            op.infer(types, attrs)
        except TypeMismatch as problem:
            pytest.fail(f"{name}: its rule refuses the example of its row in ir/ops: {problem}")


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.optional])
def test_optional_attributes_are_in_the_example_and_change_the_reference(name):
    made, optional = example(name), OPS[name].optional
    missing = [key for key in optional if key not in made.attrs]
    assert not missing, f"{name}: the example of its row in ir/ops lacks {missing}, so that nothing tests them"
    plain = replace(made, attrs={key: value for key, value in made.attrs.items() if key not in optional}).compute()
    found = made.compute()
    same = found.keys() == plain.keys() and all(np.array_equal(found[key], plain[key]) for key in found)
    assert not same, f"{name}: its reference in ir/ops gives the same without {list(optional)}"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", OPS)
def test_the_reference_makes_what_the_rule_says(name, dtype):
    for rows in ROW_COUNTS:
        made = example(name, rows, dtype)
        types = made.results()
        for result, array in made.compute(dtype).items():
            label = f"{name}: {result}"
            assert array.shape == types[result].shape, label
            if result in OPS[name].consumes:
                assert array.dtype == made.arrays[result].dtype, label
            else:
                assert array.dtype == (np.int32 if types[result].dtype == "i32" else dtype), label


@pytest.mark.parametrize("name", OPS)
def test_rows_together_are_rows_one_by_one(name):
    """Row after row, each with the states as the rows before left them; absent rows leave them as they are."""
    whole, consumes = example(name), OPS[name].consumes
    together, states = whole.compute(), {}
    for row, (_, position) in enumerate(ROWS):
        own = {operand: whole.arrays[operand][row : row + 1] for operand in whole.per_row}
        alone = whole.compute(**own, **states)
        here = position >= 0 or "positions" not in whole.arrays
        for result, array in alone.items():
            label = f"{name}: {result} of row {row}"
            if result in consumes and not here:
                np.testing.assert_array_equal(array, states.get(result, whole.arrays[result]), err_msg=label)
            elif result not in consumes and here:
                np.testing.assert_allclose(array, together[result][[row]], rtol=1e-12, atol=1e-12, err_msg=label)
        states = {result: alone[result] for result in consumes}
    for result in consumes:
        np.testing.assert_array_equal(together[result], states[result], err_msg=f"{name}: {result}")
        assert (together[result] != whole.arrays[result]).any(), f"{name}: nothing changed {result}"


@pytest.mark.parametrize("name", STATEFUL)
def test_a_sequence_does_not_see_the_other(name):
    """With the other sequence's rows absent its own results stay, and the other's states are untouched."""
    whole = example(name)
    together = whole.compute()
    for sequence in (0, 1):
        own = whole.arrays["sequences"] == sequence
        alone = whole.compute(positions=np.where(own, whole.arrays["positions"], -1).astype(np.int32))
        for result, array in alone.items():
            label = f"{name}: {result} of sequence {sequence}"
            if result in OPS[name].consumes:
                np.testing.assert_array_equal(array[sequence], together[result][sequence], err_msg=label)
                np.testing.assert_array_equal(array[1 - sequence], whole.arrays[result][1 - sequence], err_msg=label)
            else:
                here = own & (whole.arrays["positions"] >= 0)
                np.testing.assert_array_equal(array[here], together[result][here], err_msg=label)


@pytest.mark.parametrize("name", STATEFUL)
def test_sequences_may_change_places(name):
    """What is read and changed is the row's own sequence's, not another's that happens to be alike."""
    whole = example(name)
    states = {*OPS[name].consumes, *CACHES} & whole.arrays.keys()
    swapped = {state: whole.arrays[state][::-1].copy() for state in states}
    found = whole.compute(sequences=1 - whole.arrays["sequences"], **swapped)
    for result, array in whole.compute().items():
        np.testing.assert_array_equal(found[result][::-1] if result in states else found[result], array, err_msg=name)


@pytest.mark.parametrize("name", OPS)
def test_every_op_can_be_printed_and_interpreted(name):
    """Also what no kernel computes: a graph with it can be held against others."""
    for rows in ROW_COUNTS:
        one = example(name, rows)
        graph = one.graph()
        verify(graph)
        assert parse_graph(print_graph(graph)) == graph
        interpreter = Interpreter()
        results = interpreter.results(graph, interpreter.run(graph, one.arrays))
        for (result, array), (_, value) in zip(results.items(), graph.results, strict=True):
            assert array.shape == value.type.shape, f"{name}: {result}"
