"""The Dagster part. It translates; the only thing that it decides is which runs are dead."""
