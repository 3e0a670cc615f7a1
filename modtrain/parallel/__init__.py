"""How a model is spread over processes, from outside."""
