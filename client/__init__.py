"""The site: the site that owns records and budget, and what connects it to the server."""
