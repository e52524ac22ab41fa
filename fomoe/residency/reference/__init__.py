"""The residency's rules in Python, for tests of the native ones."""

from fomoe.residency.reference.logical import ReferenceLogical
from fomoe.residency.reference.residency import ReferenceResidency

__all__ = ["ReferenceLogical", "ReferenceResidency"]
