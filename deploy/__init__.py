"""Starts things: the command line, the embedded cluster, the demo."""
