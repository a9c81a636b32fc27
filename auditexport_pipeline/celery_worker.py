"""What a Celery worker loads: `dagster-celery worker start -A auditexport_pipeline.celery_worker`.

What belongs here: the app, and the definitions, loaded once for all processes that the worker forks. What does not: its
settings (`defs.executors`), which are those of the run that sends the tasks.
"""

import auditexport_pipeline.definitions  # noqa: F401  # a second and a half that no step has to wait for
from auditexport_pipeline.defs.executors import celery_app

app = celery_app()
