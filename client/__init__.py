"""The branch office: the site that owns records and budget, and what connects it to head office."""
