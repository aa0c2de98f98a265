"""The benchmark: search and training step beside what else computes them, in one run, as ratios.

Run it with ``python -m diveq_core bench``.
"""
