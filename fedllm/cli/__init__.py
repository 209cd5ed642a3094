"""The command line: entry points, which may import everything and import late."""
