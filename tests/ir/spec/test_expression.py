"""Arithmetic of specs, and nothing else."""

import pytest

from psigraph.ir.spec.expression import evaluate, names_in

SIZES = {"heads": 6, "kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads * head_dim", 96),
        ("head_dim ** -0.5", 0.25),
        ("(heads - -1) // 2", 3),
        ("heads / 4", 1.5),
        ("heads % kv_heads == 0", True),
        ("heads % 4 == 0", False),
        ("heads >= kv_heads", True),
    ],
)
def test_values(text, value):
    assert evaluate(text, SIZES) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head", "no size is called head (there are: heads, kv_heads, head_dim)"),
        ("heads %", "is no expression"),
        ("heads % 0", "heads % 0"),
        ("heads ** 9", "exponent 9 is above 8"),
        ("__import__('os')", "is not allowed in a size"),
        ("heads.real", "is not allowed in a size"),
        ("'a'", "is not allowed in a size"),
        ("True", "is not allowed in a size"),
        ("1 < heads < 9", "is not allowed in a size"),
        ("heads if heads else 1", "is not allowed in a size"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        evaluate(text, SIZES)
    assert message in str(caught.value)


def test_names():
    assert names_in("heads * head_dim + 1") == {"heads", "head_dim"}
