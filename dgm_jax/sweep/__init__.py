"""Ablation sweeps: many runs that differ in a few fields, as few compiled programs."""
