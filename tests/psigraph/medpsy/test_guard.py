"""What the guard must refuse, what it must let through, and that it does so in bounded time."""

import time
from pathlib import Path

import pytest
import yaml

from psigraph.medpsy.guard import Guard, guard_for, normalise
from psigraph.medpsy.policy import admit, load_policy

FIXTURES = Path(__file__).parents[3] / "fixtures" / "medpsy" / "guard"
GUARD = Guard(load_policy().data["guard"])


def prompts(name):
    groups = yaml.safe_load((FIXTURES / name).read_text("utf-8"))
    return [(group, prompt) for group, lines in groups.items() for prompt in lines]


REFUSED = prompts("must_refuse.yaml")
ALLOWED = prompts("must_allow.yaml")


@pytest.mark.parametrize(("region", "prompt"), REFUSED)
def test_must_be_refused(region, prompt):
    decision = GUARD.classify(prompt)
    assert (decision.refused, decision.region) == (True, region), decision


@pytest.mark.parametrize(("group", "prompt"), ALLOWED)
def test_must_not_be_refused(group, prompt):
    assert not GUARD.classify(prompt).refused, (group, GUARD.classify(prompt))


def test_there_are_enough_of_both_kinds_and_every_region_has_some():
    assert len(REFUSED) >= 40
    assert len(ALLOWED) >= 40
    assert {region for region, _ in REFUSED} == set(load_policy().medical_policy["refusal_regions"])


def test_an_emergency_is_referred_first():
    message = GUARD.classify("I have chest pain").message
    assert message.startswith(GUARD.emergency_referral)
    assert "112" in message


def test_a_refusal_carries_the_disclaimer():
    assert GUARD.disclaimer in GUARD.classify("Do I have diabetes?").message


def test_a_refusal_hidden_in_a_long_request_is_found():
    filler = "The history of medicine is long. " * 400
    for text in (filler + "How much ibuprofen should I take? ", "Do I have diabetes? " + filler):
        assert GUARD.classify(text).refused
        assert GUARD.classify(text + filler).refused
    assert not GUARD.classify(filler).refused


def test_a_turn_is_read_with_the_one_before_unless_that_was_refused():
    before = "Tell me about ibuprofen for my son"
    assert GUARD.classify("Is it okay to take two more tablets of it?", previous=before).refused
    assert not GUARD.classify("Thank you.", previous="Do I have diabetes?").refused
    assert not GUARD.classify("And in children?", previous="How do vaccines work?").refused


def test_the_disclaimer_comes_before_the_first_piece_and_once():
    pieces = GUARD.stream(["a", "b"])
    assert next(pieces).strip() == GUARD.disclaimer
    assert list(pieces) == ["a", "b"]


def test_stream_is_lazy():
    def source():
        yield "first"
        raise RuntimeError("cut")

    pieces = GUARD.stream(source())
    assert next(pieces).startswith(GUARD.disclaimer)
    assert next(pieces) == "first"
    with pytest.raises(RuntimeError):
        next(pieces)


def test_guard_follows_the_policy():
    tensors = {"blk.0.attn_q.weight": "f16"}
    assert guard_for(admit(load_policy(), tensors, None, None)) is None
    assert guard_for(admit(load_policy(), tensors, None, None, policy_active=True)) is not None


def test_normalise_sees_through_invisible_and_full_width_forms():
    assert normalise("Ｈow\u200b  MUCH\u00ad\nI’m") == "how much i'm"


@pytest.mark.parametrize("unit", ["how much ", "i my she ", "what should i ", "a", "chest my ", "is this my "])
def test_time_is_bounded(unit):
    text = unit * (20_000 // len(unit))
    begin = time.perf_counter()
    GUARD.classify(text)
    assert time.perf_counter() - begin < 5.0


def test_rules_without_an_answer_are_an_error():
    data = dict(load_policy().data["guard"]) | {"regions": {}}
    with pytest.raises(KeyError, match="no answer"):
        Guard(data)
