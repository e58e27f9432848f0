"""Trains the models that ship with the package; it is not part of the package."""
