"""What a machine or a cache would do, worked out from traces without running a model."""
