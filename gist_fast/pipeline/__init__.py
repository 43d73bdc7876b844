"""From a configuration to a trainer that is ready: what ``gist-fast train`` and ``profile`` share with Python users."""
