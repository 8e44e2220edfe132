"""A page of one file that shows one or many reports of a model; it opens without a network."""
