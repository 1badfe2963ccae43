"""An example plug-in of Ecotone."""
