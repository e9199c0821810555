"""Engines behind one port: vLLM, and transformers for machines without it."""
