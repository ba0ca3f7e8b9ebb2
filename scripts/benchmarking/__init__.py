"""What scripts/benchmark.py is made of: `peers`, the other libraries and their models, and `measuring`."""
