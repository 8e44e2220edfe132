"""Work items: what is computed of one layer, as values that travel, and what runs them."""
