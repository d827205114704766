"""Tier from tensor types, admission rules and their refusals."""

import hashlib

import pytest

from psigraph.ir.errors import PolicyRefusal, UnsupportedModelError, UsageError
from psigraph.medpsy.policy import admit, is_quantized, load_policy, policy_from_text, template_digest, tier_of
from psigraph.runtime.gguf.file import GgufFile, open_gguf
from psigraph.runtime.synth.model import write_synth

REAL_SHA256 = "41ee947d9cce72ec657577219fd1798fabeabf0d832217fe23c9d6d3d18d5880"
REAL_TEMPLATE = "8d51e8f9694b24924c7795050ecb7a605fcbd0d7980b40c56ad3e0561d465de7"
OTHER_SHA256 = "0" * 64
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def medium_layers(layers):
    return {i for i in range(layers) if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2}


def a_file(base, layers=28, head=None, embed=None, **parts):
    """Tensor types of a Qwen3 file: every matrix `base` but the parts named; a callable part takes the layer."""
    tensors = {"token_embd.weight": embed or base, "output_norm.weight": "f32"}
    if head:
        tensors["output.weight"] = head
    for layer in range(layers):
        for norm in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = "f32"
        for part in PARTS:
            dtype = parts.get(part, base)
            tensors[f"blk.{layer}.{part}.weight"] = dtype(layer) if callable(dtype) else dtype
    return tensors


def medium(base, layers=28, **more):
    better = medium_layers(layers)
    upgrade = lambda layer: "q6_k" if layer in better else base  # noqa: E731
    return a_file(base, layers, attn_v=upgrade, ffn_down=upgrade, **more)


IQ3_M = a_file("iq3_s", head="q6_k", attn_v="q4_k", attn_output="q4_k", ffn_down=lambda i: "q4_k" if i < 3 else "iq3_s")
IQ3_XXS = a_file("iq3_xxs", attn_q="iq2_s", attn_k="iq2_s", attn_output="iq3_s", ffn_down="q3_k", embed="iq3_s")


@pytest.mark.parametrize(
    ("tensors", "tier"),
    [
        (medium("q4_k", head="q6_k"), "Q4_K_M"),
        (medium("q4_k", embed="q6_k"), "Q4_K_M"),
        (medium("q4_k", layers=1), "Q4_K_M"),
        (medium("q4_k", layers=36), "Q4_K_M"),
        (a_file("q4_k", attn_v=lambda i: "q5_k" if i < 4 else "q4_k"), "Q4_K_S"),
        (medium("q5_k", head="q6_k"), "Q5_K_M"),
        (a_file("q5_k", head="q6_k"), "Q5_K_S"),
        (a_file("q6_k"), "Q6_K"),
        (a_file("q8_0"), "Q8_0"),
        (a_file("bf16"), "BF16"),
        (a_file("f16"), "F16"),
        (a_file("q4_0", head="q6_k"), "Q4_0"),
        (a_file("iq4_xs", attn_v="q5_k", ffn_down="iq4_nl"), "IQ4_XS"),
        (a_file("iq4_nl", head="q6_k"), "IQ4_NL"),
        (IQ3_M, "IQ3_M"),
        (a_file("iq3_s", attn_v="q4_k"), "IQ3_S"),
        (a_file("iq3_s", attn_q="iq3_xxs", attn_k="iq3_xxs", ffn_gate="iq3_xxs", ffn_up="iq3_xxs"), "IQ3_XS"),
        (IQ3_XXS, "IQ3_XXS"),
        (a_file("q3_k"), "Q3_K_S"),
        (a_file("q3_k", attn_output="q4_k"), "Q3_K_M"),
        (a_file("q3_k", attn_output="q5_k"), "Q3_K_L"),
        (a_file("q2_k", attn_v="q3_k"), "Q2_K"),
        # One weak matrix among good ones names the family: nothing hides behind a majority.
        (medium("q8_0") | {"blk.9.ffn_up.weight": "iq3_xxs"}, "IQ3_XXS"),
    ],
)
def test_tier_is_read_off_the_types(tensors, tier):
    assert tier_of(tensors) == tier
    assert tier_of({name: dtype.upper() for name, dtype in tensors.items()}, "1.7b") == tier


def test_norms_do_not_name_a_tier_and_no_matrix_is_an_error():
    with pytest.raises(UnsupportedModelError, match="no weight matrix"):
        tier_of({"output_norm.weight": "f32"})
    with pytest.raises(UnsupportedModelError, match=r"blk.0.ffn_up.weight: type q9_z"):
        tier_of(a_file("q4_k") | {"blk.0.ffn_up.weight": "q9_z"})


def decide(tensors, sha256=OTHER_SHA256, template=None, **options):
    return admit(load_policy(), tensors, sha256, template, **options)


def test_the_real_artifact_is_admitted_and_activates_the_medical_policy():
    admission = decide(medium("q4_k", head="q6_k"), REAL_SHA256, size_label="1.7b")
    assert (admission.admitted, admission.policy_active, admission.decision) == (True, True, "preferred")
    assert "MedPsy-1.7B" in admission.artifact_name
    assert any("Q4_K_M weights are quantized" in warning for warning in admission.warnings)


def test_another_digest_runs_unadmitted():
    admission = decide(medium("q4_k"), size_label="1.7b")
    assert (admission.admitted, admission.policy_active) == (False, False)
    assert not decide(medium("q4_k"), None).admitted


def test_the_template_or_the_flag_activates_the_policy_without_admitting():
    by_template = decide(medium("q4_k"), template=REAL_TEMPLATE)
    by_flag = decide(medium("q4_k"), policy_active=True)
    assert by_template.policy_active
    assert by_flag.policy_active
    assert not by_template.admitted
    assert not by_flag.admitted


def test_template_digest_is_of_the_bytes():
    assert template_digest("{{ a }}é") == hashlib.sha256("{{ a }}é".encode()).hexdigest()
    assert template_digest(b"\xff".decode("utf-8", "surrogateescape")) == hashlib.sha256(b"\xff").hexdigest()


@pytest.mark.parametrize(
    ("tensors", "size", "rule"),
    [
        (IQ3_M, "1.7b", "iq3_m_of_the_1_7b"),
        (IQ3_M, "4b", "iq3_m_of_the_4b"),
        (IQ3_M, "", "any_3_bit_route"),
        (IQ3_XXS, "1.7b", "any_iq3_xxs"),
        (IQ3_XXS, "4b", "any_iq3_xxs"),
        (a_file("q3_k"), "8b", "any_3_bit_route"),
        (a_file("iq3_s"), "1.7b", "any_3_bit_route"),
        (a_file("q2_k"), "4b", "fewer_than_3_bits"),
        (a_file("iq1_s"), "", "fewer_than_3_bits"),
    ],
)
def test_three_bits_and_fewer_need_the_override(tensors, size, rule):
    with pytest.raises(PolicyRefusal, match=rule) as refusal:
        decide(tensors, size_label=size)
    message = str(refusal.value)
    assert tier_of(tensors) in message
    assert "--allow-blocked-quantization" not in message  # no kernel reads them: that would be the next refusal
    assert "medpsy" not in message
    assert "\n" not in message
    with pytest.raises(PolicyRefusal, match=f"{rule} of the policy medpsy"):
        decide(tensors, size_label=size, policy_active=True)
    admission = decide(tensors, size_label=size, allow_blocked=True)
    assert admission.overridden
    assert not admission.admitted
    assert admission.rule == rule
    assert "--allow-blocked-quantization" in admission.warnings[0]
    assert len(admission.warnings) == 2
    assert admission.record()["overridden"] is True


def test_warnings_are_said_where_the_policy_is_active_and_recorded_everywhere():
    other, ours = decide(a_file("q6_k")), decide(a_file("q6_k"), policy_active=True)
    assert other.warnings == ours.warnings == ours.said
    assert other.said == ()


def test_the_override_is_recorded_only_where_it_was_needed():
    assert not decide(medium("q4_k"), allow_blocked=True).overridden


@pytest.mark.parametrize(
    ("tensors", "decision", "warnings"),
    [
        (a_file("bf16"), "preferred", 0),
        (a_file("q8_0"), "preferred", 1),
        (a_file("iq4_xs"), "allowed_with_warning", 2),
        (a_file("iq4_nl"), "allowed_with_warning", 2),
        (a_file("q6_k"), "allowed_with_warning", 2),
        (a_file("f16"), "allowed_with_warning", 1),
    ],
)
def test_every_quantized_route_carries_its_warning(tensors, decision, warnings):
    admission = decide(tensors, size_label="1.7b")
    assert admission.decision == decision
    assert len(admission.warnings) == warnings
    assert is_quantized(admission.tier) == any("are quantized" in warning for warning in admission.warnings)


def test_expected_digest():
    assert decide(medium("q4_k"), expect_sha256=OTHER_SHA256)
    with pytest.raises(PolicyRefusal, match=f"the file's digest is {OTHER_SHA256}"):
        decide(medium("q4_k"), expect_sha256=REAL_SHA256)
    with pytest.raises(PolicyRefusal, match="not computed"):
        decide(medium("q4_k"), None, expect_sha256=REAL_SHA256)
    with pytest.raises(UsageError, match="64 hexadecimal"):
        decide(medium("q4_k"), expect_sha256="41ee")


def test_a_policy_that_contradicts_the_artifact_is_refused():
    with pytest.raises(PolicyRefusal, match="policy calls it Q4_K_M, its tensors Q8_0"):
        decide(a_file("q8_0"), REAL_SHA256)


def test_sizes_and_bandwidth_floor():
    policy = load_policy()
    assert policy.size_label(2048, 6144) == "1.7b"
    assert policy.size_label(256, 768) == ""
    assert policy.bandwidth_floor("NVIDIA H100 80GB HBM3") == 3000.0
    assert policy.bandwidth_floor("NVIDIA GeForce RTX 4080") is None


def test_a_policy_text_without_rules_refuses_everything():
    text = "policy: x\nartifacts: []\nquantization: {rules: [], receipt_warning: w}\nmedical_policy: {}\n"
    with pytest.raises(PolicyRefusal, match="no rule"):
        admit(policy_from_text(text), a_file("bf16"), None, None)


def test_a_3_bit_file_is_refused_by_its_header_alone(tmp_path, monkeypatch):
    path = tmp_path / "named-q4_k_m.gguf"
    write_synth(path, "1.7b", "iq3_m", 1, layers=1, vocab=2048)
    monkeypatch.setattr(GgufFile, "read", lambda *_: pytest.fail("a weight was read"))
    with open_gguf(path) as model:
        tensors = {name: tensor.dtype for name, tensor in model.tensors.items()}
        size = load_policy().size_label(
            model.metadata["qwen3.embedding_length"], model.metadata["qwen3.feed_forward_length"]
        )
        with pytest.raises(PolicyRefusal, match=r"IQ3_M weights of the 1\.7b.*iq3_m_of_the_1_7b"):
            decide(tensors, size_label=size)
