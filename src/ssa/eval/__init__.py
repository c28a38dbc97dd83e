"""Perplexity and needle-in-a-haystack, under full and sparse inference."""
