"""Settings that all tests share."""

from hypothesis import settings

# A busy machine is no failure: time is bounded per test, by pytest's own limit.
settings.register_profile("fomoe", deadline=None)
settings.load_profile("fomoe")
