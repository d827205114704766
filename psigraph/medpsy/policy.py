"""Which files may run, and what is said about them: models/medpsy.yaml decided by code.

The tier is read off the tensors' types, never off the file's name. Admission needs only the header of a file
(names and types) and digests, so that it runs before any weight is read:

    policy = load_policy()
    admission = admit(policy, {"blk.0.attn_q.weight": "q4_k", ...}, sha256, template_digest, size_label="1.7b")
    for warning in admission.said: ...
    report["admission"] = admission.record()
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from .. import models
from ..ir.errors import PolicyRefusal, UnsupportedModelError, UsageError

OVERRIDE_OPTION = "--allow-blocked-quantization"

# Weakest first: (type, whole bits a weight). Ties in bits are broken by what llama.cpp's recipes upgrade to.
_TYPES = (
    ("iq1_s", 1), ("tq1_0", 1), ("iq1_m", 1), ("q1_0", 1),
    ("tq2_0", 2), ("iq2_xxs", 2), ("iq2_xs", 2), ("iq2_s", 2), ("q2_k", 2),
    ("iq3_xxs", 3), ("iq3_s", 3), ("q3_k", 3),
    ("iq4_xs", 4), ("mxfp4", 4), ("nvfp4", 4), ("iq4_nl", 4), ("q4_k", 4), ("q4_0", 4), ("q4_1", 4),
    ("q5_k", 5), ("q5_0", 5), ("q5_1", 5),
    ("q6_k", 6),
    ("q8_0", 8), ("q8_1", 8), ("q8_k", 8),
    ("f16", 16), ("bf16", 16), ("f32", 32), ("f64", 64),
)  # fmt: skip
_RANK = {name: rank for rank, (name, _) in enumerate(_TYPES)}
_BITS = dict(_TYPES)
_UNQUANTIZED = frozenset({"F16", "BF16", "F32", "F64"})
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYER_TENSOR = re.compile(r"blk\.(\d{1,4})\.(.+)")  # the reader allows no larger number


@dataclass(frozen=True)
class Rule:
    """One row of the quantization table; an empty tuple or text matches everything."""

    name: str
    tiers: tuple[str, ...]
    bits: tuple[int, ...]
    size: str
    decision: str
    override_needed: bool

    def matches(self, tier: str, bits: int, size_label: str) -> bool:
        return (
            (not self.tiers or tier in self.tiers)
            and (not self.bits or bits in self.bits)
            and (not self.size or size_label.lower() == self.size)
        )


@dataclass(frozen=True)
class Policy:
    """models/medpsy.yaml, read. `data` is the whole file for those who want the rest of it."""

    artifacts: tuple[Mapping[str, Any], ...]
    rules: tuple[Rule, ...]
    receipt_warning: str
    medical_policy: Mapping[str, Any]
    data: Mapping[str, Any] = field(repr=False)

    def artifact_of(self, sha256: str | None) -> Mapping[str, Any] | None:
        """The known artifact with this digest, or None."""
        return next((one for one in self.artifacts if sha256 and one["sha256"] == sha256), None)

    def is_medpsy(self, sha256: str | None, template_digest: str | None) -> bool:
        """Whether either digest is that of a known MedPsy artifact."""
        known_template = any(template_digest and one["template_sha256"] == template_digest for one in self.artifacts)
        return known_template or self.artifact_of(sha256) is not None

    def size_label(self, hidden: int, feed_forward: int) -> str:
        """The label ("1.7b") of a model with these widths, or "" for widths of no published size.

        Layers are not asked: a shortened file must not slip past a rule that names its size.
        """
        for row in self.data["sizes"]:
            if (row["hidden"], row["feed_forward"]) == (hidden, feed_forward):
                return str(row["label"])
        return ""

    def bandwidth_floor(self, gpu: str) -> float | None:
        """Least believable read bandwidth of a GPU of this name in GB/s, None where nothing is known."""
        for row in self.data["least_read_bandwidth_gb_s"]:
            if row["gpu"] in gpu:
                return float(row["at_least"])
        return None

    def benchmark_record(self) -> dict[str, Any]:
        """The `medical_policy` object of a benchmark report (schema psionic.medpsy.bench.v1)."""
        keys = (
            "policy_id",
            "default_classification",
            "disclaimer_required",
            "direct_diagnosis_allowed",
            "prescribing_or_treatment_authority_allowed",
            "benchmark_claim_boundary",
        )
        return {key: self.medical_policy[key] for key in keys}


@dataclass(frozen=True)
class Admission:
    """What the policy says about one file. Built by `admit`, which raises instead where the answer is no."""

    tier: str
    decision: str
    rule: str
    warnings: tuple[str, ...]
    admitted: bool
    overridden: bool
    policy_active: bool
    reasons: tuple[str, ...]
    artifact_name: str
    sha256: str | None
    medical_policy: Mapping[str, Any] = field(repr=False)

    @property
    def said(self) -> tuple[str, ...]:
        """The warnings that a user is shown: those of a policy that is active, and none about other files."""
        return self.warnings if self.policy_active else ()

    def record(self) -> dict[str, Any]:
        """For a report: plain values. `medical_policy` is moved to the report's top level by `build_report`."""
        return {
            "tier": self.tier,
            "decision": self.decision,
            "rule": self.rule,
            "admitted": self.admitted,
            "overridden": self.overridden,
            "policy_active": self.policy_active,
            "artifact_name": self.artifact_name,
            "warnings": list(self.warnings),
            "reasons": list(self.reasons),
            "medical_policy": dict(self.medical_policy),
        }


@cache
def load_policy() -> Policy:
    """The policy that ships with this package (models/medpsy.yaml)."""
    return policy_from_text(resources.files(models).joinpath("medpsy.yaml").read_text("utf-8"))


def policy_from_text(text: str) -> Policy:
    """A policy from the text of a file like models/medpsy.yaml; KeyError names a missing part."""
    # libyaml reads this file twenty times as fast, and every command that opens a model waits for it.
    data = yaml.load(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    rules = tuple(
        Rule(
            name=row["rule"],
            tiers=tuple(row.get("tier", ())),
            bits=tuple(row.get("bits", ())),
            size=str(row.get("size", "")),
            decision=row["decision"],
            override_needed=row.get("override") == "needed",
        )
        for row in data["quantization"]["rules"]
    )
    return Policy(
        artifacts=tuple(data["artifacts"]),
        rules=rules,
        receipt_warning=data["quantization"]["receipt_warning"],
        medical_policy=data["medical_policy"],
        data=data,
    )


def template_digest(chat_template: str) -> str:
    """SHA-256 (64 hex digits) of a chat template's text in UTF-8, as the artifact table holds it.

    A template that was read losslessly (surrogateescape) gives the digest of its bytes.
    """
    return hashlib.sha256(chat_template.encode("utf-8", "surrogateescape")).hexdigest()


def matrix_types(tensors: Mapping[str, str]) -> dict[str, str]:
    """The entries of `tensors` (name -> ggml type) that are weight matrices: everything but norms and biases."""
    return {
        name: dtype.lower()
        for name, dtype in tensors.items()
        if not name.endswith(("_norm.weight", ".bias")) and not name.startswith("rope_freqs")
    }


def tier_of(tensors: Mapping[str, str], size_label: str = "") -> str:
    """The quantization tier ("Q4_K_M", "IQ3_M", "BF16", ...) of a file with these tensors (name -> ggml type).

    The weakest type of any weight matrix names the family, so that a few good tensors hide no bad ones; the
    letter (S, M, L) then follows from where llama.cpp's recipe would have put better types. `size_label` is
    accepted for symmetry with the rules and does not change the tier.

    Raises UnsupportedModelError for a file without matrices or with a type this table does not know.
    """
    del size_label
    matrices = matrix_types(tensors)
    if not matrices:
        raise UnsupportedModelError("no weight matrix in the file: its quantization tier cannot be decided")
    for name, dtype in matrices.items():
        if dtype not in _RANK:
            raise UnsupportedModelError(f"{name}: type {dtype} is of no known quantization tier")
    weakest = min(matrices.values(), key=_RANK.__getitem__)
    if _BITS[weakest] == 2 and _most_common(matrices, "ffn_gate.weight", "ffn_up.weight") == "iq3_xxs":
        return "IQ3_XXS"  # that recipe gives attn_q and attn_k two bits; its bulk and its name are IQ3_XXS
    if weakest == "iq3_xxs":
        return "IQ3_XS" if _most_common(matrices, "ffn_down.weight") == "iq3_s" else "IQ3_XXS"
    if weakest == "iq3_s":
        return "IQ3_M" if _upgraded(matrices, "iq3_s", "attn_output.weight", "attn_v.weight") else "IQ3_S"
    if weakest == "q3_k":
        output = _most_common(matrices, "attn_output.weight") or "q3_k"
        return {3: "Q3_K_S", 4: "Q3_K_M"}.get(_BITS[output], "Q3_K_L")
    if weakest in ("q4_k", "q5_k"):
        return f"{weakest.upper()}_{'M' if _follows_medium_recipe(matrices) else 'S'}"
    return weakest.upper()


def is_quantized(tier: str) -> bool:
    """Whether a tier name stands for quantized weights."""
    return tier not in _UNQUANTIZED


def whole_bits(tensors: Mapping[str, str]) -> int:
    """Whole bits a weight of the weakest matrix type: 3 for any file with an iq3_s, iq3_xxs or q3_k matrix."""
    return min(_BITS[dtype] for dtype in matrix_types(tensors).values())


def admit(
    policy: Policy,
    tensors: Mapping[str, str],
    sha256: str | None,
    template_digest: str | None,
    *,
    size_label: str = "",
    allow_blocked: bool = False,
    expect_sha256: str | None = None,
    policy_active: bool = False,
) -> Admission:
    """Decide about a file from its header and digests, before any weight is read.

    tensors: name -> ggml type, lower case. sha256: of the whole file, None if it was not computed.
    template_digest: see the function of that name, None without a template. size_label: `Policy.size_label`.
    allow_blocked: --allow-blocked-quantization. expect_sha256: --expect-sha256.
    policy_active: True where the user asked for it (--policy medpsy); a known digest activates it anyway, and
    nothing switches it off.

    Raises PolicyRefusal (a tier that needs the override, a digest that differs), UsageError (a malformed
    expectation), UnsupportedModelError (see `tier_of`).
    """
    _check_expectation(expect_sha256, sha256)
    active = policy_active or policy.is_medpsy(sha256, template_digest)
    tier = tier_of(tensors)
    bits = whole_bits(tensors)
    rule = next((rule for rule in policy.rules if rule.matches(tier, bits, size_label)), None)
    if rule is None:
        raise PolicyRefusal(f"{tier} weights: no rule speaks of this tier")
    of_size = f" of the {size_label}" if size_label else ""
    refused = rule.decision == "blocked" or rule.override_needed
    if refused and not allow_blocked:
        from ..ir.types import WEIGHT_DTYPES  # only here: numpy comes with it, and commands begin without

        state = "is blocked" if rule.decision == "blocked" else "is allowed only on request"
        whose = f" of the policy {policy.data['policy']}" if active else ""
        # Without kernels for these weights the override would only lead to the next refusal.
        runs = set(matrix_types(tensors).values()) <= set(WEIGHT_DTYPES)
        override = f", or give {OVERRIDE_OPTION}" if runs else ""
        raise PolicyRefusal(
            f"{tier} weights{of_size}: this tier {state} by rule {rule.name}{whose}; use Q4_K_M or better{override}"
        )

    artifact = policy.artifact_of(sha256)
    warnings = []
    if refused:
        warnings.append(f"{tier}{of_size} runs by {OVERRIDE_OPTION}, against rule {rule.name}")
    elif rule.decision == "allowed_with_warning":
        unlisted = rule.name == "unlisted_tier"
        warnings.append(
            f"{tier} is not in the admission table of the policy {policy.data['policy']}"
            if unlisted
            else f"{tier} is allowed but not preferred: Q4_K_M, Q5_K_M, Q8_0 or BF16 are"
        )
    if is_quantized(tier):
        warnings.append(policy.receipt_warning.format(tier=tier))

    reasons = [f"tier {tier} by the tensors' types, rule {rule.name}: {rule.decision}"]
    if artifact is not None and artifact["tier"] != tier:
        # Cannot happen with the published digest: it says that the policy file itself is wrong.
        raise PolicyRefusal(f"artifact {artifact['name']}: the policy calls it {artifact['tier']}, its tensors {tier}")
    if artifact is not None:
        reasons.append(f"sha256 is that of {artifact['name']} ({artifact['repository']}, {artifact['file']})")
    elif sha256 is None:
        reasons.append("sha256 was not computed: not admitted")
    else:
        reasons.append("sha256 is of no artifact in the admission table: not admitted")
    return Admission(
        tier=tier,
        decision=rule.decision,
        rule=rule.name,
        warnings=tuple(warnings),
        admitted=artifact is not None and not refused,
        overridden=refused,
        policy_active=active,
        reasons=tuple(reasons),
        artifact_name=artifact["name"] if artifact is not None else "",
        sha256=sha256,
        medical_policy=policy.benchmark_record(),
    )


def _check_expectation(expected: str | None, sha256: str | None) -> None:
    if expected is None:
        return
    if not _SHA256.fullmatch(expected.lower()):
        raise UsageError(f"--expect-sha256 {expected}: give the 64 hexadecimal digits of a SHA-256")
    if sha256 is None:
        raise PolicyRefusal("--expect-sha256: the file's digest was not computed, so it cannot be compared")
    if sha256 != expected.lower():
        raise PolicyRefusal(f"--expect-sha256 {expected.lower()}: the file's digest is {sha256}")


def _most_common(matrices: Mapping[str, str], *endings: str) -> str:
    """The most frequent type among the matrices with these name endings, the weaker on a tie; "" without any."""
    counts: dict[str, int] = {}
    for name, dtype in matrices.items():
        if not endings or name.endswith(endings):
            counts[dtype] = counts.get(dtype, 0) + 1
    return min(counts, key=lambda dtype: (-counts[dtype], _RANK[dtype])) if counts else ""


def _upgraded(matrices: Mapping[str, str], base: str, *endings: str) -> bool:
    """Whether most matrices with these endings have a better type than `base`."""
    types = [dtype for name, dtype in matrices.items() if name.endswith(endings)]
    return 2 * sum(_RANK[dtype] > _RANK[base] for dtype in types) > len(types)


def _follows_medium_recipe(matrices: Mapping[str, str]) -> bool:
    """Whether attn_v and ffn_down are Q6_K or better in at least as many layers as Q4_K_M and Q5_K_M put there.

    The rule of those recipes for layer i of n: i < n/8, or i >= 7n/8, or (i - n/8) mod 3 = 2.
    """
    layers = 1 + max((int(match[1]) for name in matrices if (match := _LAYER_TENSOR.match(name))), default=-1)
    due = sum(i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2 for i in range(layers))
    return layers > 0 and all(
        sum(name.endswith(ending) and _BITS[dtype] >= 6 for name, dtype in matrices.items()) >= due
        for ending in ("attn_v.weight", "ffn_down.weight")
    )
