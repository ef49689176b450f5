"""The public gRPC services of `diptych.v1`."""
