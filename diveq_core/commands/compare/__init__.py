"""A small patch autoencoder, trained once per estimator and seed on the same photographs.

Run it with ``python -m diveq_core compare``.

A training step is array API code with hand-derived gradients from end to end, so it runs in any library; NumPy
prepares data, start and random numbers on the host, and `libraries` says how each library takes them.
"""
