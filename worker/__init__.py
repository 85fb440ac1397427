"""Serves requests with a paged, prefix-caching engine."""
