"""How runs are started on a cluster. Imports `dino`, never the reverse."""
