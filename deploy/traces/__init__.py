"""Traces of requests: who asked when, for how much, and which prefixes they share; `rhizome trace …`."""
