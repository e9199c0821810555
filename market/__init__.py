"""A compute marketplace on Ray: GPU leases and metered tokens behind one OpenAI endpoint."""

__version__ = "0.1.0"
