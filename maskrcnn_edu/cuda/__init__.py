"""Native ops and their wrappers."""
