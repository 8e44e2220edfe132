"""The families of operators with weights that are decomposed."""
