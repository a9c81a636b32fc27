"""Fixtures of the acceptance tests: those of Dagster's, beside the suite's own."""

from __future__ import annotations

from auditexport_tests.integration.dagster.conftest import clock, empty_home, exporter, heart, home, hook, no_waits

__all__ = ["clock", "empty_home", "exporter", "heart", "home", "hook", "no_waits"]
