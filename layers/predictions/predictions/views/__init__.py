"""Resources as callers see them, as JSON."""
