"""AWS through Ray's own cluster launcher."""
