"""come_pl: make a dense causal language model shallower, and good again."""

__version__ = "0.1.0"
