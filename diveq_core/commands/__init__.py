"""The command line, ``compare`` and ``bench``: applications of the library."""
