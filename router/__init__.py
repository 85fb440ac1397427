"""Decides which worker serves a request, and streams the answer."""
