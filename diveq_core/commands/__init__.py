"""The command line: tokens of files, ``compare`` and ``bench``; applications of the library."""
