"""Dagster glue: it translates and does not decide."""
