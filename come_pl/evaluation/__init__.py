"""Measuring models: perplexity."""
