"""Where requests come in: gRPC, HTTP, the Open Inference Protocol, and the page."""
