"""Files that users write: plans and recipes, read strictly."""
