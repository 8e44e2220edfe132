"""From a graph to its layers: weights with all the nodes that apply them."""
