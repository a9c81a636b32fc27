"""The Dagster instance of `dagster_glue`, for these tests too."""

from auditexport_tests.dagster_glue.conftest import empty_home, exporter, home

__all__ = ["empty_home", "exporter", "home"]
