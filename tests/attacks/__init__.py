"""The server, played by a script against real sites, tries to learn a record: one file an attack."""
