"""What a Celery worker loads: `dagster-celery worker start -A auditexport_pipeline.celery_worker`.

The definitions are loaded once, for all processes that the worker forks.
"""

import auditexport_pipeline.definitions  # noqa: F401  # a second and a half that no step has to wait for
from auditexport_pipeline.defs import celery_steps

app = celery_steps.app()
