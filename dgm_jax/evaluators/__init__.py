"""Measurements of trained models, by what a model can do and never by its name."""
