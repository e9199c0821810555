"""The ``market`` command: one file per noun, no logic."""
