"""The server, compatible with OpenAI's and Anthropic's: an HTTP front, and the engine in a process of its own."""
