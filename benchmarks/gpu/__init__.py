"""Everything that is measured on one GPU, by one command: `python -m benchmarks.gpu`."""
