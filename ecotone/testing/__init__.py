"""Conformance suites: what every search, operator, objective, tracker and model wrapper must do, as tests to inherit.

The author of a plug-in subclasses a suite in a test file, names what is to be tested, and pytest runs every test of
the suite over it. Ecotone's own kinds run through the same suites. Needs pytest.
"""
