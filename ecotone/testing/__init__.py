"""Conformance suites: tests that every kind of a sort must pass, for the authors of plug-ins as for ours.

A suite is a class of pytest tests. A subclass whose name begins with ``Test`` gives the fixtures that it names.
"""
