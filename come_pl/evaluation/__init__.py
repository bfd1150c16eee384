"""Measuring models: perplexity, multiple-choice tasks, latency."""
