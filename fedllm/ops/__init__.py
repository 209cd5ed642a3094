"""Operating a federation: health checks, service files, and a look at a TLS port."""
