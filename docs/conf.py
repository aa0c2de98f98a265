"""Sphinx settings: ``python -m sphinx -W docs site``."""

project = "diveq-core"
author = "The diveq-core authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
html_theme = "furo"
exclude_patterns = ["_build"]
numpydoc_show_class_members = False
autodoc_typehints = "none"
suppress_warnings = ["myst.xref_missing"]
