"""What users see, and nothing else: the CLI, Dagster's own commands, and two servers that are asked in SQL.

Nothing here imports `auditexport_pipeline`, so these tests pass unmodified before and after any change of the code inside.
"""
