"""What must never leak, who may connect, and that data stays data."""
