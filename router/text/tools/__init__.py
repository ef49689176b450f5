"""Tool calls in answers: read as they come (`families`), or demanded by a grammar (`demand`). Pure."""
