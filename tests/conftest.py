"""Fixtures that several test files use."""

from hub_server import hub  # noqa: F401
