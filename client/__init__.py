"""The branch office: the site that owns records and budget, and the courier that carries its messages."""
