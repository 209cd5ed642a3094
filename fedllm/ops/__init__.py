"""Operating a federation: health checks of `fedllm doctor`, files for service managers, and a probe of a TLS port."""
