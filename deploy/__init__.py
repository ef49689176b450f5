"""The composition root: configuration, Ray Serve application, command line, manifests. Imported by nobody."""
