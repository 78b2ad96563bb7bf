"""Comparisons of our drivers with other programs; each is run by itself: python -m benchmarks.<type>."""
