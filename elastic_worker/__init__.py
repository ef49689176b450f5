"""A worker process: it does both parts over one engine, and begins with the role that it is started for."""
