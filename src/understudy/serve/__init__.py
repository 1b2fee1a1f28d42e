"""The server: the engine behind HTTP, and what is seen of it from outside."""
