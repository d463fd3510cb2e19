"""Who may call the server's own services: TLS, keys, permissions and limits of keys."""
