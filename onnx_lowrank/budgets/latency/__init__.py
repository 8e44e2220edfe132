"""Time: of layers and of whole models, measured where they will run."""
