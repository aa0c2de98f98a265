"""Array libraries: the standard, the backends that bind them, the search, and the geometry of rows."""
