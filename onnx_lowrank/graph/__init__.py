"""Reading the graphs of a model: scopes, producers and consumers, shapes, constants, weights."""
