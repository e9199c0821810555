"""Adapters to Ray, Ray Serve, processes and hardware."""
