"""What travels between head office and the sites."""
