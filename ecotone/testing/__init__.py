"""Conformance suites, for our own tests and for those of plug-ins. They need pytest."""
