"""What structured output is: formats, limits, translation for llguidance. Router and engine share it."""
