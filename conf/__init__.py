"""Hydra configuration groups; one choice a file."""
