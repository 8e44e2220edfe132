"""Files that users write or read: plans, recipes and reports, all read strictly."""
