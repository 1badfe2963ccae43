"""Data and models of the ready recipes."""

IMPORTS: dict[str, tuple[str, str]] = {
    "ecotone.experiments.examples.digits": ("digits", "sklearn"),
    "ecotone.experiments.examples.digit_questions": ("digits", "sklearn"),
    "ecotone.experiments.examples.smollm": ("language", "transformers"),
    "ecotone.experiments.examples.text": ("hf", "transformers"),
}
"""The extra and the package that the data and models of a module need. They are told here: an edit of the module itself
would have everybody's models prepared anew."""
