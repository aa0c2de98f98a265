"""The commands ``fit``, ``encode``, ``decode`` and ``inspect``: from vectors in files to tokens in files, and back."""
