"""The composition root: recipes, the command line, tracking and reports."""
