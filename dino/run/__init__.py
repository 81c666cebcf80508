"""One configuration that trains in one directory."""
