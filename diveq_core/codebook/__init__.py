"""Upkeep of a codebook outside of gradient steps, and its beginnings."""
