"""Ray Serve applications: the gateway (HTTP) and the model replicas behind it."""
