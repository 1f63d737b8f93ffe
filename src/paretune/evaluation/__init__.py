"""Measurements: what makes a front."""
