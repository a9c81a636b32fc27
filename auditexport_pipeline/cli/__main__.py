"""`python -m auditexport_pipeline.cli`: the same as `auditexport`."""

from auditexport_pipeline.cli import main

main()
