"""Student output -> velocity: the policies, and the one registry of their kinds.

The formulas are those of the section on policies in Chen et al., pi-Flow, arXiv:2510.14974, written once for every
array library.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Union, get_args

from .dx import DXPolicy, DXPolicySpec
from .gm import GMPolicy, GMPolicySpec
from .gmk import GMKPolicy, GMKPolicySpec
from .policy import MixtureRollout, Policy, PolicyKind, RawMixture, Rollout, VelocityField, WeightedSum

# The registry: one class for each kind of policy.
PolicySpec = Union[GMPolicySpec, DXPolicySpec, GMKPolicySpec]  # noqa: UP007

POLICIES: dict[str, type[PolicySpec]] = {spec().kind: spec for spec in get_args(PolicySpec)}
# Name on the command line -> kind, and the fields that the name fixes.
POLICY_NAMES = {name: (spec, fixed) for spec in POLICIES.values() for name, fixed in spec.names.items()}


def policy_spec_from_json(description: Mapping[str, Any]) -> PolicySpec:
    """Return the kind that `dataclasses.asdict` described."""
    settings = dict(description)
    return POLICIES[settings.pop("kind")](**settings)


def name_policy_spec(name: str, **settings: Any) -> PolicySpec:
    """Return the kind of one of `POLICY_NAMES`, with those of the `settings` that it has."""
    spec, fixed = POLICY_NAMES[name]
    own = {field.name for field in fields(spec)}
    return spec(**{key: value for key, value in settings.items() if key in own} | dict(fixed))


__all__ = [
    "POLICIES",
    "POLICY_NAMES",
    "DXPolicy",
    "DXPolicySpec",
    "GMKPolicy",
    "GMKPolicySpec",
    "GMPolicy",
    "GMPolicySpec",
    "MixtureRollout",
    "Policy",
    "PolicyKind",
    "PolicySpec",
    "RawMixture",
    "Rollout",
    "VelocityField",
    "WeightedSum",
    "name_policy_spec",
    "policy_spec_from_json",
]
