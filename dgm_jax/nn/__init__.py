"""Shared Linen blocks."""
