"""Student output -> velocity: the policies, and the one registry of their kinds.

The formulas are those of the section on policies in Chen et al., pi-Flow, arXiv:2510.14974, written once for every
array library.
"""

from .dx import DXPolicy, DXPolicySpec
from .gm import GMPolicy, GMPolicySpec
from .policy import VelocityField

# Kind -> the class of its fixed numbers, which says all that a kind must say of itself.
POLICIES = {"gm": GMPolicySpec, "dx": DXPolicySpec}

Policy = GMPolicy | DXPolicy
PolicySpec = GMPolicySpec | DXPolicySpec

__all__ = [
    "POLICIES",
    "DXPolicy",
    "DXPolicySpec",
    "GMPolicy",
    "GMPolicySpec",
    "Policy",
    "PolicySpec",
    "VelocityField",
]
