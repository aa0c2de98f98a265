"""One small patch autoencoder, trained once per estimator on the same photographs: ``python -m diveq_core compare``.

The experiment is array API code with hand-derived gradients from end to end, so it runs in any library; only
`libraries`, which names them, and the modules that read images or draw pictures know a library by name.
"""
