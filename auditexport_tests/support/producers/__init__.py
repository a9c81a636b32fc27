"""Producers beside the audit log, as packages of somebody else's would bring them: through the public API only."""
