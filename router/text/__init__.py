"""Between text and tokens: tokenizer, chat templates, tool calls, structured output."""
