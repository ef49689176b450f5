"""Where a request runs: the workers as the router sees them, what each placement would cost, and which is chosen."""
